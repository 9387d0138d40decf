//! The threads that models compute on.
//!
//! Each loaded model has its own threads and its own bounded queue, for three reasons. A computation never holds up the threads that the
//! mesh and its callers' sockets live on. A slow canary fills its own queue and keeps its own threads, and the operating system gives stable's
//! their turn while it computes: one pool for all models would have nobody who takes a thread away from a long run. And rten hands
//! each run to a thread pool of its own, so computing elsewhere would cost the same two thread switches: here a worker *is* the one
//! thread of its rten pool, and a run stays on it.
//!
//! A model begins with one thread and gets another whenever a request finds none idle, up to the number of cores that this process may use.
//! So a model that nobody asks costs one, and one that everybody asks can take the whole machine, as the others can.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use std::{io, thread};

use async_io::Timer;
use futures::channel::oneshot;
use rten::{RunOptions, ThreadPool};

/// Threads of one model at most. Fewer where there are fewer cores.
pub const INFERENCE_THREADS_MAX: usize = 128;
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

/// What a model's threads do.
pub(crate) trait Work: Send + Sync + 'static {
    /// A request as it came.
    type Call: Send + 'static;
    /// A request as it is computed.
    type Read: Send + 'static;
    /// An answer.
    type Answer: Send + 'static;

    /// Reads a request. What cannot be read has its answer already.
    fn read(&self, call: Self::Call) -> Result<Self::Read, Self::Answer>;
    /// Answers one request.
    fn compute(&self, read: Self::Read, options: &RunOptions) -> Self::Answer;
}

/// A model's threads. They end when it is dropped.
pub(crate) struct Workers<W: Work>(Arc<Shared<W>>);

struct Shared<W: Work> {
    name: String,
    work: Arc<W>,
    limit: Duration,
    queue: Mutex<Queue<W>>,
    arrived: Condvar,
    /// What each thread computes. Taken after the queue's, where both are taken.
    running: Vec<Mutex<Option<Pending<W::Answer>>>>,
}

struct Queue<W: Work> {
    waiting: VecDeque<(W::Call, Pending<W::Answer>)>,
    threads: usize,
    /// Threads that wait for a request, also those that are on their way to one.
    idle: usize,
    closed: bool,
}

/// Somebody who waits for an answer.
struct Pending<A> {
    since: Instant,
    reply: oneshot::Sender<Result<A, WorkError>>,
}

impl<W: Work> Workers<W> {
    /// Starts the first thread.
    pub(crate) fn start(name: &str, work: Arc<W>) -> io::Result<Workers<W>> {
        Workers::with_limit(name, work, Duration::from_millis(INFERENCE_MS_MAX))
    }

    fn with_limit(name: &str, work: Arc<W>, limit: Duration) -> io::Result<Workers<W>> {
        let threads_max = thread::available_parallelism()?.get().min(INFERENCE_THREADS_MAX);
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            work,
            limit,
            queue: Mutex::new(Queue { waiting: VecDeque::new(), threads: 1, idle: 0, closed: false }),
            arrived: Condvar::new(),
            running: (0..threads_max).map(|_| Mutex::default()).collect(),
        });
        shared.start_thread(0)?;
        async_std::task::spawn(watch(Arc::downgrade(&shared)));
        Ok(Workers(shared))
    }

    /// Has one request answered. Whoever stops waiting is skipped if its turn has not come.
    pub(crate) async fn run(&self, call: W::Call) -> Result<W::Answer, WorkError> {
        let (reply, answer) = oneshot::channel();
        self.0.submit(call, Pending { since: Instant::now(), reply })?;
        answer.await.unwrap_or_else(|_| Err(WorkError::Panicked("its threads have ended".to_owned())))
    }
}

impl<W: Work> Drop for Workers<W> {
    fn drop(&mut self) {
        self.0.queue().closed = true;
        self.0.arrived.notify_all();
    }
}

impl<W: Work> Shared<W> {
    fn queue(&self) -> MutexGuard<'_, Queue<W>> {
        lock(&self.queue)
    }

    fn submit(self: &Arc<Self>, call: W::Call, pending: Pending<W::Answer>) -> Result<(), WorkError> {
        let mut queue = self.queue();
        if queue.waiting.len() >= INFERENCE_QUEUE_MAX {
            return Err(WorkError::Busy);
        }
        queue.waiting.push_back((call, pending));
        if queue.waiting.len() <= queue.idle {
            drop(queue);
            self.arrived.notify_one();
        } else if queue.threads < self.running.len() {
            let number = queue.threads;
            queue.threads += 1;
            drop(queue);
            if let Err(error) = self.start_thread(number) {
                // Those that there are do it. The number is not given away again: the system has refused a thread, and it is not asked for each request.
                log::warn!(event = "thread_refused", thread = self.name.as_str(); "no further thread can be started: {error}");
            }
        }
        Ok(())
    }

    fn start_thread(self: &Arc<Self>, number: usize) -> io::Result<()> {
        let shared = Arc::clone(self);
        let serve = move || {
            let pool = Arc::new(ThreadPool::with_num_threads(1));
            let options = RunOptions::default().with_thread_pool(Some(Arc::clone(&pool)));
            pool.run(|| shared.serve(number, &options));
        };
        thread::Builder::new().name(self.name.clone()).spawn(serve).map(drop)
    }

    /// What one thread does until the model is dropped.
    fn serve(&self, number: usize, options: &RunOptions) {
        while let Some(call) = self.next(number) {
            // A model's state is read only while it runs, so there is nothing half-changed behind a panic.
            let answer = catch_unwind(AssertUnwindSafe(|| match self.work.read(call) {
                Ok(read) => self.work.compute(read, options),
                Err(answer) => answer,
            }));
            let pending = self.running.get(number).and_then(|running| lock(running).take());
            // There is none where it was too late.
            if let Some(pending) = pending {
                let _ = pending.reply.send(answer.map_err(|panic| WorkError::Panicked(said(panic.as_ref()))));
            }
        }
    }

    /// Waits for the next request that somebody still waits for.
    fn next(&self, number: usize) -> Option<W::Call> {
        let mut queue = self.queue();
        loop {
            match queue.waiting.pop_front() {
                Some((_, pending)) if pending.reply.is_canceled() => {}
                Some((call, pending)) => {
                    if let Some(running) = self.running.get(number) {
                        *lock(running) = Some(pending);
                    }
                    return Some(call);
                }
                None if queue.closed => return None,
                None => {
                    queue.idle += 1;
                    queue = self.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
                    queue.idle -= 1;
                }
            }
        }
    }

    /// Tells everybody who has waited too long. The next moment at which somebody will have: whoever comes later is due later.
    fn tell_late(&self, now: Instant) -> Instant {
        let mut next = now + self.limit;
        let mut late = Vec::new();
        let mut queue = self.queue();
        while queue.waiting.front().is_some_and(|(_, pending)| pending.since + self.limit <= now) {
            late.extend(queue.waiting.pop_front().map(|(_, pending)| pending));
        }
        next = queue.waiting.front().map_or(next, |(_, pending)| pending.since + self.limit).min(next);
        for running in &self.running {
            let mut running = lock(running);
            late.extend(running.take_if(|pending| pending.since + self.limit <= now));
            next = running.as_ref().map_or(next, |pending| pending.since + self.limit).min(next);
        }
        drop(queue);
        for pending in late {
            let _ = pending.reply.send(Err(WorkError::Late(self.limit.as_millis())));
        }
        next
    }
}

/// A timer of its own for each request would cost more than many a model does.
async fn watch<W: Work>(shared: Weak<Shared<W>>) {
    while let Some(next) = shared.upgrade().map(|shared| shared.tell_late(Instant::now())) {
        Timer::at(next).await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<W: Work> std::fmt::Debug for Workers<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Workers({})", self.0.name)
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
    use futures::FutureExt as _;

    /// Answers by a function.
    struct By<F>(F);

    impl<R: Send + 'static, F: Fn(&'static str) -> R + Send + Sync + 'static> Work for By<F> {
        type Call = &'static str;
        type Read = &'static str;
        type Answer = R;

        fn read(&self, call: &'static str) -> Result<&'static str, R> {
            Ok(call)
        }

        fn compute(&self, read: &'static str, _: &RunOptions) -> R {
            (self.0)(read)
        }
    }

    fn workers<R: Send + 'static, F: Fn(&'static str) -> R + Send + Sync + 'static>(work: F, limit_ms: u64) -> Workers<By<F>> {
        Workers::with_limit("test", Arc::new(By(work)), Duration::from_millis(limit_ms)).unwrap()
    }

    #[test]
    fn a_panic_is_an_error_and_the_threads_live_on() {
        let echo = |body: &'static str| {
            assert_ne!(body, "bad", "such a body");
            body.len()
        };
        let workers = workers(echo, INFERENCE_MS_MAX);
        for _ in 0..2 * workers.0.running.len() {
            let Err(WorkError::Panicked(said)) = block_on(workers.run("bad")) else { panic!() };
            assert!(said.contains("such a body"), "{said}");
        }
        assert_eq!(block_on(workers.run("good")), Ok(4));
    }

    #[test]
    fn a_full_queue_refuses_and_nobody_computes_for_whoever_went_away() {
        let (begun_in, begun) = mpsc::channel();
        let (go, wait) = mpsc::channel::<()>();
        let wait = Mutex::new(wait);
        let hold = move |body: &'static str| {
            begun_in.send(body).unwrap();
            if body == "hold" {
                wait.lock().unwrap().recv().ok();
            }
        };
        let workers = workers(hold, INFERENCE_MS_MAX);
        let threads = thread::available_parallelism().unwrap().get().min(INFERENCE_THREADS_MAX);
        let poll = |body: &'static str| {
            let mut run = Box::pin(workers.run(body));
            let first = (&mut run).now_or_never();
            (run, first)
        };
        let _held: Vec<_> = (0..threads).map(|_| poll("hold")).collect();
        for _ in 0..threads {
            begun.recv().unwrap();
        }
        let waiting: Vec<_> = (0..INFERENCE_QUEUE_MAX).map(|_| poll("skipped")).collect();
        assert_eq!(poll("refused").1, Some(Err(WorkError::Busy)));
        drop(waiting);
        drop(go);
        let last = loop {
            // The queue is emptied by skipping; until then it is full.
            match block_on(workers.run("last")) {
                Err(WorkError::Busy) => thread::yield_now(),
                other => break other,
            }
        };
        assert_eq!(last, Ok(()));
        assert_eq!(begun.recv().unwrap(), "last");
        assert_eq!(workers.0.queue().threads, threads, "no more than there are cores");
    }

    #[test]
    fn a_late_answer_is_not_waited_for_whether_it_is_computed_or_not() {
        let (go, wait) = mpsc::channel::<()>();
        let wait = Mutex::new(wait);
        let hold = move |_| {
            wait.lock().unwrap().recv().ok();
        };
        let workers = workers(hold, 20);
        let calls = (0..2 * workers.0.running.len()).map(|_| workers.run(""));
        for answer in block_on(futures::future::join_all(calls)) {
            assert_eq!(answer, Err(WorkError::Late(20)));
        }
        drop(go);
        assert_eq!(block_on(workers.run("")), Ok(()), "the threads are there for the next");
    }
}
