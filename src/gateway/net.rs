//! What the data plane needs of a reactor: connections, and tasks that drive them. async-std's is one; another can take its place.

use std::io;

use async_std::net::TcpStream;
use futures::future::{BoxFuture, FutureExt as _};
use hyper::rt::{Read, Write};
use smol_hyper::rt::FuturesIo;

/// A connection that hyper can speak over.
pub trait Io: Read + Write + Send + Unpin {}

impl<T: Read + Write + Send + Unpin> Io for T {}

/// Where connections to model servers come from.
pub trait Net: Send + Sync {
    /// Connects. The host is a name or an address; whoever calls sets the time limit.
    fn connect<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<Box<dyn Io>>>;

    /// Runs a task to its end, beside everything else.
    fn spawn(&self, task: BoxFuture<'static, ()>);
}

/// TCP on async-std.
#[derive(Clone, Copy, Default, Debug)]
pub struct AsyncStdNet;

impl Net for AsyncStdNet {
    fn connect<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<Box<dyn Io>>> {
        async move {
            let stream = TcpStream::connect((host, port)).await?;
            // Without it a head and its body, sent as two segments, wait 40 ms for each other.
            stream.set_nodelay(true)?;
            Ok(Box::new(FuturesIo::new(stream)) as Box<dyn Io>)
        }
        .boxed()
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        async_std::task::spawn(task);
    }
}
