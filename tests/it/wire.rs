//! One connection to a node, byte by byte: what is sent is what a test has written, and what comes back is read by the letter.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use crate::mesh::{Answer, PATIENCE, connect};

pub struct Wire(BufReader<TcpStream>);

/// What came when an answer was waited for.
#[derive(Debug)]
pub enum Came {
    Answer(Answer),
    /// The node closed the connection, between two answers.
    End,
    /// Something that is no answer, or the beginning of one.
    Broken(String),
}

impl Wire {
    pub fn to(port: u16) -> Wire {
        Wire::within(PATIENCE, port)
    }

    /// One that waits no longer than this for anything.
    pub fn within(patience: Duration, port: u16) -> Wire {
        let stream = connect(patience, port).unwrap();
        stream.set_nodelay(true).unwrap();
        Wire(BufReader::new(stream))
    }

    /// Sends; a node that has refused something before may have closed meanwhile.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.0.get_mut().write_all(bytes.as_ref());
    }

    /// Says that nothing more will be sent.
    pub fn end_sending(&self) {
        let _ = self.0.get_ref().shutdown(Shutdown::Write);
    }

    /// A second handle, to send on while this one reads.
    pub fn writer(&self) -> TcpStream {
        self.0.get_ref().try_clone().unwrap()
    }

    /// Whether the connection is open and nothing has come.
    pub fn is_silent(&self) -> bool {
        let stream = self.0.get_ref();
        stream.set_nonblocking(true).unwrap();
        let seen = stream.peek(&mut [0]);
        stream.set_nonblocking(false).unwrap();
        self.0.buffer().is_empty() && seen.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    /// The next answer, interim ones left out.
    pub fn answer(&mut self) -> Came {
        loop {
            let came = self.one_answer();
            if !matches!(&came, Came::Answer(answer) if answer.status == 100) {
                return came;
            }
        }
    }

    /// The same where nothing else than an answer is right.
    pub fn expect_answer(&mut self) -> Answer {
        match self.answer() {
            Came::Answer(answer) => answer,
            Came::End => panic!("an answer was to come, and the connection was closed"),
            Came::Broken(what) => panic!("an answer was to come: {what}"),
        }
    }

    fn one_answer(&mut self) -> Came {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            match self.0.read_until(b'\n', &mut head) {
                // A node that closes on bytes it has not read resets the connection.
                Ok(0) if head.is_empty() => return Came::End,
                Err(error) if head.is_empty() && error.kind() == ErrorKind::ConnectionReset => return Came::End,
                Ok(0) => return broken(&head, "closed within a head"),
                Ok(_) => {}
                Err(error) => return broken(&head, &error.to_string()),
            }
        }
        let Ok(text) = String::from_utf8(head.clone()) else { return broken(&head, "not a head") };
        let status = text.strip_prefix("HTTP/1.1 ").or_else(|| text.strip_prefix("HTTP/1.0 ")).and_then(|rest| rest.get(..3)?.parse().ok());
        let Some(status) = status else { return broken(&head, "not a head") };
        let mut answer = Answer { status, head: text, body: Vec::new() };
        let is_chunked = answer.header("transfer-encoding") == Some("chunked");
        let read = match answer.header("content-length").map(str::parse) {
            None if is_chunked => self.chunks(&mut answer.body),
            // An answer without a length has no body here: nothing that these tests ask for ends with its connection.
            None => Ok(()),
            Some(Ok(length)) if !is_chunked => {
                answer.body.resize(length, 0);
                self.0.read_exact(&mut answer.body).map_err(|error| error.to_string())
            }
            Some(_) => Err("its length is said twice, or is no number".to_owned()),
        };
        match read {
            Ok(()) => Came::Answer(answer),
            Err(why) => broken(&head, &why),
        }
    }

    fn chunks(&mut self, body: &mut Vec<u8>) -> Result<(), String> {
        loop {
            let mut size = String::new();
            self.0.read_line(&mut size).map_err(|error| error.to_string())?;
            let digits = size.strip_suffix("\r\n").ok_or("closed within a chunk's size")?;
            let length = usize::from_str_radix(digits, 16).map_err(|error| format!("{digits:?} is no size: {error}"))?;
            let mut chunk = vec![0; length + 2];
            self.0.read_exact(&mut chunk).map_err(|error| error.to_string())?;
            if chunk.split_off(length) != b"\r\n" {
                return Err("a chunk does not end where its size says".to_owned());
            }
            if chunk.is_empty() {
                return Ok(());
            }
            body.append(&mut chunk);
        }
    }
}

fn broken(head: &[u8], why: &str) -> Came {
    Came::Broken(format!("{why}: {:?}", String::from_utf8_lossy(head)))
}
