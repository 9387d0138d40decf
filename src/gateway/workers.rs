//! The threads that models compute on.
//!
//! Each loaded model has its own few threads and its own bounded queue, for three reasons. A computation never holds up the executor's threads,
//! which the mesh's links and timers live on. A slow canary fills its own queue, not stable's. And rten hands each run to a
//! thread pool of its own, so computing on the executor would cost the same two thread switches, only with the executor
//! blocked meanwhile: here a worker *is* the one thread of its rten pool, and a run stays on it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;
use std::{io, thread};

use async_io::Timer;
use async_std::channel::{Receiver, Sender, TrySendError, bounded};
use bytes::Bytes;
use futures::channel::oneshot;
use futures::future::{Either, select};
use rten::{RunOptions, ThreadPool};

/// Threads of one model at most. Fewer where there are fewer cores.
pub const INFERENCE_THREADS_MAX: usize = 4;
/// Requests that may wait for one model; more are answered 503.
pub const INFERENCE_QUEUE_MAX: usize = 256;
/// Time for one inference, from the moment its request is complete, in milliseconds.
pub const INFERENCE_MS_MAX: u64 = 30_000;

/// Why there is no answer.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum WorkError {
    #[error("{INFERENCE_QUEUE_MAX} requests wait for it already")]
    Busy,
    #[error("it gave no answer within {0} ms")]
    Late(u128),
    #[error("it panicked: {0}")]
    Panicked(String),
}

/// A model's threads. They end when it is dropped.
#[derive(Debug)]
pub(crate) struct Workers<R> {
    jobs: Sender<Job<R>>,
    limit: Duration,
}

struct Job<R> {
    body: Bytes,
    reply: oneshot::Sender<Result<R, WorkError>>,
}

impl<R: Send + 'static> Workers<R> {
    /// Starts as many threads as there are cores, up to the limit. `work` answers one request's body.
    pub(crate) fn start<W>(name: &str, work: W) -> io::Result<Workers<R>>
    where
        W: Fn(&[u8], &RunOptions) -> R + Send + Sync + 'static,
    {
        let threads = thread::available_parallelism()?.get().min(INFERENCE_THREADS_MAX);
        let (jobs, queue) = bounded(INFERENCE_QUEUE_MAX);
        let work = Arc::new(work);
        for _ in 0..threads {
            let (queue, work) = (queue.clone(), Arc::clone(&work));
            let pool = Arc::new(ThreadPool::with_num_threads(1));
            let options = RunOptions::default().with_thread_pool(Some(Arc::clone(&pool)));
            let run = move || pool.run(|| serve(&queue, work.as_ref(), &options));
            thread::Builder::new().name(name.to_owned()).spawn(run)?;
        }
        Ok(Workers { jobs, limit: Duration::from_millis(INFERENCE_MS_MAX) })
    }

    /// Has one request answered. Whoever stops waiting is skipped if its turn has not come.
    pub(crate) async fn run(&self, body: Bytes) -> Result<R, WorkError> {
        let (reply, answer) = oneshot::channel();
        self.jobs.try_send(Job { body, reply }).map_err(|error| match error {
            TrySendError::Full(_) => WorkError::Busy,
            TrySendError::Closed(_) => gone(),
        })?;
        match select(answer, Timer::after(self.limit)).await {
            Either::Left((answer, _)) => answer.unwrap_or_else(|_| Err(gone())),
            Either::Right(_) => Err(WorkError::Late(self.limit.as_millis())),
        }
    }
}

fn gone() -> WorkError {
    WorkError::Panicked("its threads have ended".to_owned())
}

fn serve<R>(queue: &Receiver<Job<R>>, work: &(impl Fn(&[u8], &RunOptions) -> R + ?Sized), options: &RunOptions) {
    while let Ok(Job { body, reply }) = queue.recv_blocking() {
        if reply.is_canceled() {
            continue;
        }
        // A model's state is read only while it runs, so there is nothing half-changed behind a panic.
        let answer = catch_unwind(AssertUnwindSafe(|| work(&body, options)));
        let _ = reply.send(answer.map_err(|panic| WorkError::Panicked(said(panic.as_ref()))));
    }
}

/// What a panic said.
pub(crate) fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a word".to_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use async_std::task::block_on;

    #[test]
    fn a_panic_is_an_error_and_the_threads_live_on() {
        let workers = Workers::start("test", |body, _| {
            assert_ne!(body, b"bad", "such a body");
            body.len()
        });
        let workers = workers.unwrap();
        for _ in 0..2 * INFERENCE_THREADS_MAX {
            let Err(WorkError::Panicked(said)) = block_on(workers.run(Bytes::from_static(b"bad"))) else { panic!() };
            assert!(said.contains("such a body"), "{said}");
        }
        assert_eq!(block_on(workers.run(Bytes::from_static(b"good"))), Ok(4));
    }

    #[test]
    fn a_full_queue_refuses_and_nobody_computes_for_whoever_went_away() {
        let (begun_in, begun) = mpsc::channel();
        let (go, wait) = mpsc::channel::<()>();
        let wait = std::sync::Mutex::new(wait);
        let workers = Workers::start("test", move |body, _| {
            begun_in.send(body.to_vec()).unwrap();
            if body == b"hold" {
                wait.lock().unwrap().recv().ok();
            }
        });
        let workers = workers.unwrap();
        let threads = thread::available_parallelism().unwrap().get().min(INFERENCE_THREADS_MAX);
        let poll = |body: &'static [u8]| {
            let mut run = Box::pin(workers.run(Bytes::from_static(body)));
            let first = futures::FutureExt::now_or_never(&mut run);
            (run, first)
        };
        let _held: Vec<_> = (0..threads).map(|_| poll(b"hold")).collect();
        for _ in 0..threads {
            begun.recv().unwrap();
        }
        let waiting: Vec<_> = (0..INFERENCE_QUEUE_MAX).map(|_| poll(b"skipped")).collect();
        assert_eq!(poll(b"refused").1, Some(Err(WorkError::Busy)));
        drop(waiting);
        drop(go);
        let last = loop {
            // The queue is emptied by skipping; until then it is full.
            match block_on(workers.run(Bytes::from_static(b"last"))) {
                Err(WorkError::Busy) => thread::yield_now(),
                other => break other,
            }
        };
        assert_eq!(last, Ok(()));
        assert_eq!(begun.recv().unwrap(), b"last");
    }

    #[test]
    fn a_late_answer_is_not_waited_for() {
        let (go, wait) = mpsc::channel::<()>();
        let wait = std::sync::Mutex::new(wait);
        let workers = Workers::start("test", move |_, _| {
            wait.lock().unwrap().recv().ok();
        });
        let workers = Workers { limit: Duration::from_millis(20), ..workers.unwrap() };
        assert_eq!(block_on(workers.run(Bytes::new())), Err(WorkError::Late(20)));
        drop(go);
    }
}
