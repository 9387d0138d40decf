//! Asks all nodes again and again, each by a task of its own: one that hangs or is gone holds nothing up.

use std::time::Duration;

use async_std::channel::{Receiver, bounded};
use async_std::task;
use futures::future::BoxFuture;

use crate::cli::client::{ASK_TIMEOUT_MS_MAX, CallError, Client};

/// From one answer of a node to the next question to it, in milliseconds.
const ASK_PAUSE_MS: u64 = 100;
/// Answers that may wait to be looked at.
const ANSWERS_QUEUED_MAX: usize = 64;

/// What one node answered.
pub struct Heard<T> {
    /// Which of the nodes, in the order in which they were given.
    pub index: usize,
    /// Its answer, or why there is none.
    pub answer: Result<T, CallError>,
}

/// One question, as often as it is wanted.
pub type Question<T> = for<'a> fn(&'a mut Client, &'a str) -> BoxFuture<'a, Result<T, CallError>>;

/// The answers as they come, until nobody takes them any more. `about` is handed to each question.
pub fn ask_all<T: Send + 'static>(clients: Vec<Client>, about: &str, question: Question<T>) -> Receiver<Heard<T>> {
    let (answers, heard) = bounded(ANSWERS_QUEUED_MAX);
    for (index, mut client) in clients.into_iter().enumerate() {
        client.timeout = client.timeout.min(Duration::from_millis(ASK_TIMEOUT_MS_MAX));
        let (answers, about) = (answers.clone(), about.to_owned());
        task::spawn(async move {
            while !answers.is_closed() {
                let answer = question(&mut client, &about).await;
                if answers.send(Heard { index, answer }).await.is_err() {
                    return;
                }
                task::sleep(Duration::from_millis(ASK_PAUSE_MS)).await;
            }
        });
    }
    heard
}
