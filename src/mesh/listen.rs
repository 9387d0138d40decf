//! Taking connections: each shakes hands here, in one task, before it costs more than a socket.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use async_io::{Async, Timer};
use async_std::future::timeout;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};

use crate::core::ids::NodeId;
use crate::mesh::handshake::{self, Failed, HANDSHAKE_MS_MAX, Hello, Known, Refusal, Why};
use crate::mesh::link::{End, Link};
use crate::mesh::socket::{Socket, Stream, linger};
use crate::mesh::{MeshEvent, Shared};

/// Connections that may shake hands at the same time; more wait in the kernel's queue.
pub const UNAUTHENTICATED_MAX: usize = 64;
/// The pause after the system could not give a connection, in milliseconds.
const ACCEPT_PAUSE_MS: u64 = 200;

/// Accepts until its task is cancelled.
pub(super) async fn listen(shared: Arc<Shared>, listener: Async<TcpListener>) {
    let mut greetings = FuturesUnordered::new();
    loop {
        if greetings.len() >= UNAUTHENTICATED_MAX {
            greetings.next().await;
        }
        futures::select_biased! {
            () = greetings.select_next_some() => {}
            accepted = listener.accept().fuse() => match accepted {
                Ok((stream, address)) => greetings.push(greet(&shared, stream, address)),
                Err(error) => {
                    shared.refused(None, format!("cannot take a connection: {error}")).await;
                    Timer::after(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
                }
            },
        }
    }
}

/// One connection, until it is a link or closed.
async fn greet(shared: &Shared, stream: Async<TcpStream>, address: SocketAddr) {
    // A connection that is gone before its first byte is nobody's loss.
    let Ok(socket) = Socket::new(stream) else { return };
    let mut stream = socket.into_stream();
    let failed = match shake_hands(shared, &mut stream).await {
        Ok(hello) => match shared.arrive(stream, &hello) {
            None => return,
            Some((returned, refusal)) => {
                // The handshake is over: the refusal goes over the link that does not come to be. A cut says nothing against the peer, which
                // may still be reached over a third node: it hears of the cut when it dials again.
                if refusal != Refusal::Cut {
                    Link::new(returned.get_ref().clone(), &hello, Arc::default()).refuse(&refusal.to_string());
                }
                stream = returned;
                Failed { peer: Some(hello.node), why: refusal.into() }
            }
        },
        Err(failed) => failed,
    };
    let reason = format!("{address}: {}", failed.why);
    if let Some(peer) = failed.peer.as_ref().and_then(|id| shared.peer(id)) {
        peer.note(End { reason: reason.clone(), refused: failed.why.is_refusal() });
    }
    shared.refused(failed.peer, reason).await;
    linger(stream).await;
}

async fn shake_hands(shared: &Shared, stream: &mut Stream) -> Result<Hello, Failed> {
    let shaking = handshake::accept(stream, &shared.identity, |hello| shared.admit(hello));
    let shaken = timeout(Duration::from_millis(HANDSHAKE_MS_MAX), shaking).await;
    shaken.unwrap_or(Err(Failed { peer: None, why: Why::TooSlow }))
}

impl Shared {
    fn admit(&self, hello: &Hello) -> Result<(), Refusal> {
        match self.peer(&hello.node) {
            Some(peer) => peer.admit(hello),
            None => handshake::check_dialler(&self.identity, hello, Known::No),
        }
    }

    fn arrive(&self, stream: Stream, hello: &Hello) -> Option<(Stream, Refusal)> {
        match self.peer(&hello.node) {
            Some(peer) => peer.arrive(stream, hello),
            None => Some((stream, Refusal::UnknownId { theirs: hello.node.clone(), ours: self.identity.node.clone() })),
        }
    }

    async fn refused(&self, peer: Option<NodeId>, reason: String) {
        // Nobody to tell means that the node stops.
        let _told = self.events.send(MeshEvent::Refused { peer, reason }).await;
    }
}
