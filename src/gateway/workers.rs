//! The threads that models compute on.
//!
//! Each loaded model has its own threads and its own bounded queue, for three reasons. A computation of some length does not hold up the threads
//! that the mesh and its callers' sockets live on (a short one is computed there: [`super::here`]). A slow canary fills its own queue and keeps its own threads, and the operating system gives stable's
//! their turn while it computes: one pool for all models would have nobody who takes a thread away from a long run. And rten hands
//! each run to a thread pool of its own, so computing elsewhere would cost the same two thread switches: here a worker *is* the one
//! thread of its rten pool, and a run stays on it.
//!
//! Requests may be computed together, if the model's settings say so: a thread that has taken one takes along what waits and may join it, and
//! waits for more of them if it is told to.
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
    /// Computes requests together; an answer to each, in their order.
    fn compute(&self, batch: Vec<Self::Read>, options: &RunOptions) -> Vec<Self::Answer>;
    /// How long a request may wait for others to be computed with; `None` if each is computed alone.
    fn wait(&self) -> Option<Duration>;
    /// Whether others may still join these.
    fn has_room(&self, batch: &[Self::Read]) -> bool;
    /// Whether this one may.
    fn may_join(&self, batch: &[Self::Read], next: &Self::Read) -> bool;
}

/// A model's threads. They end when it is dropped.
pub(crate) struct Workers<W: Work>(Arc<Shared<W>>);

struct Shared<W: Work> {
    name: String,
    work: Arc<W>,
    limit: Duration,
    queue: Mutex<Queue<W>>,
    /// For threads that are idle.
    arrived: Condvar,
    /// For threads that gather a batch.
    joined: Condvar,
    /// One of each thread.
    running: Vec<Running<W::Answer>>,
}

/// Who waits for what one thread computes, each in a place; nobody in one that has its answer. Locked after the queue, where both are.
struct Running<A>(Mutex<Vec<Option<Pending<A>>>>);

struct Queue<W: Work> {
    waiting: VecDeque<(Request<W>, Pending<W::Answer>)>,
    threads: usize,
    /// Threads that wait for a request, also those that are on their way to one.
    idle: usize,
    /// Threads that have a request, and wait for others that may join it.
    gathering: usize,
    closed: bool,
}

enum Request<W: Work> {
    New(W::Call),
    /// It was taken out, and could not join.
    Read(W::Read),
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
            queue: Mutex::new(Queue { waiting: VecDeque::new(), threads: 1, idle: 0, gathering: 0, closed: false }),
            arrived: Condvar::new(),
            joined: Condvar::new(),
            running: (0..threads_max).map(|_| Running(Mutex::default())).collect(),
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
        queue.waiting.push_back((Request::New(call), pending));
        self.rouse(queue);
        Ok(())
    }

    /// Sees to it that somebody takes what waits.
    fn rouse(self: &Arc<Self>, mut queue: MutexGuard<'_, Queue<W>>) {
        if queue.gathering > 0 {
            drop(queue);
            self.joined.notify_one();
        } else if queue.idle > 0 && (queue.waiting.len() <= queue.idle || queue.threads >= self.running.len()) {
            // More may wait than threads are idle, and all of them asleep: what came while one gathered has roused no other.
            drop(queue);
            self.arrived.notify_one();
        } else if queue.threads < self.running.len() {
            let number = queue.threads;
            queue.threads += 1;
            drop(queue);
            if let Err(error) = self.start_thread(number) {
                // Those that there are do it. The system has refused one, and is not asked again for each request.
                said!(log::warn!(event = "thread_refused", thread = self.name.as_str(); "no further thread can be started: {error}"));
            }
        }
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
    fn serve(self: &Arc<Self>, number: usize, options: &RunOptions) {
        while let Some((request, since)) = self.next(number) {
            let mut batch = Vec::new();
            // Which of those who wait each of the batch is for.
            let mut places = Vec::new();
            if let Some(read) = self.read(number, 0, request) {
                batch.push(read);
                places.push(0);
                self.gather(number, since, &mut batch, &mut places);
            }
            if batch.is_empty() {
                continue;
            }
            // A model's state is read only while it runs, so there is nothing half-changed behind a panic.
            match catch_unwind(AssertUnwindSafe(|| self.work.compute(batch, options))) {
                Ok(answers) => places.into_iter().zip(answers).for_each(|(place, answer)| self.reply(number, place, Ok(answer))),
                Err(panic) => {
                    let said = said(panic.as_ref());
                    places.into_iter().for_each(|place| self.reply(number, place, Err(WorkError::Panicked(said.clone()))));
                }
            }
        }
    }

    /// Reads a request, or answers it at once.
    fn read(&self, number: usize, place: usize, request: Request<W>) -> Option<W::Read> {
        let call = match request {
            Request::Read(read) => return Some(read),
            Request::New(call) => call,
        };
        match catch_unwind(AssertUnwindSafe(|| self.work.read(call))) {
            Ok(Ok(read)) => return Some(read),
            Ok(Err(answer)) => self.reply(number, place, Ok(answer)),
            Err(panic) => self.reply(number, place, Err(WorkError::Panicked(said(panic.as_ref())))),
        }
        None
    }

    /// Takes along what may be computed together with the first, which has waited since then.
    fn gather(self: &Arc<Self>, number: usize, since: Instant, batch: &mut Vec<W::Read>, places: &mut Vec<usize>) {
        let Some(wait) = self.work.wait() else { return };
        while self.work.has_room(batch) {
            let Some((place, request)) = self.another(number, wait, since + wait) else { break };
            let Some(read) = self.read(number, place, request) else { continue };
            if self.work.may_join(batch, &read) {
                batch.push(read);
                places.push(place);
                continue;
            }
            // It is the next, for whoever is there first.
            let mut queue = self.queue();
            let pending = self.running.get(number).and_then(|running| lock(&running.0).get_mut(place)?.take());
            if let Some(pending) = pending {
                queue.waiting.push_front((Request::Read(read), pending));
            }
            break;
        }
        let queue = self.queue();
        // Those that came meanwhile have roused nobody but this thread.
        if !queue.waiting.is_empty() {
            self.rouse(queue);
        }
    }

    /// The next request that somebody still waits for, and since when.
    fn next(&self, number: usize) -> Option<(Request<W>, Instant)> {
        let mut queue = self.queue();
        if let Some(running) = self.running.get(number) {
            lock(&running.0).clear();
        }
        loop {
            // What comes while a thread gathers is for that one: two that gather at once would wait for each other's requests.
            if queue.gathering == 0
                && let Some((_, request, since)) = self.take(&mut queue, number)
            {
                return Some((request, since));
            }
            if queue.closed {
                return None;
            }
            queue.idle += 1;
            queue = self.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }

    /// One more, if it comes in time, and its place. Without waiting, only what no idle thread is about to take.
    fn another(&self, number: usize, wait: Duration, until: Instant) -> Option<(usize, Request<W>)> {
        let mut queue = self.queue();
        loop {
            if (!wait.is_zero() || queue.waiting.len() > queue.idle)
                && let Some((place, request, _)) = self.take(&mut queue, number)
            {
                return Some((place, request));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || queue.closed {
                return None;
            }
            queue.gathering += 1;
            (queue, _) = self.joined.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner);
            queue.gathering -= 1;
        }
    }

    /// Takes a request out of the queue and notes who waits for it, in which place.
    fn take(&self, queue: &mut Queue<W>, number: usize) -> Option<(usize, Request<W>, Instant)> {
        let mut running = self.running.get(number).map(|running| lock(&running.0))?;
        loop {
            let (request, pending) = queue.waiting.pop_front()?;
            if !pending.reply.is_canceled() {
                let since = pending.since;
                running.push(Some(pending));
                return Some((running.len() - 1, request, since));
            }
        }
    }

    /// Answers whoever waits in this place. There is nobody where it was too late.
    fn reply(&self, number: usize, place: usize, answer: Result<W::Answer, WorkError>) {
        let pending = self.running.get(number).and_then(|running| lock(&running.0).get_mut(place)?.take());
        if let Some(pending) = pending {
            let _ = pending.reply.send(answer);
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
            for pending in lock(&running.0).iter_mut() {
                late.extend(pending.take_if(|pending| pending.since + self.limit <= now));
                next = pending.as_ref().map_or(next, |pending| pending.since + self.limit).min(next);
            }
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

    /// Answers each by a function, in batches of so many with the same first letter.
    struct By<F> {
        answer: F,
        together_max: usize,
        wait: Option<Duration>,
        batches: Mutex<Vec<usize>>,
    }

    impl<R: Send + 'static, F: Fn(&'static str) -> R + Send + Sync + 'static> Work for By<F> {
        type Call = &'static str;
        type Read = &'static str;
        type Answer = R;

        fn read(&self, call: &'static str) -> Result<&'static str, R> {
            if call.starts_with("unreadable") { Err((self.answer)(call)) } else { Ok(call) }
        }

        fn compute(&self, batch: Vec<&'static str>, _: &RunOptions) -> Vec<R> {
            self.batches.lock().unwrap().push(batch.len());
            batch.into_iter().map(&self.answer).collect()
        }

        fn wait(&self) -> Option<Duration> {
            self.wait
        }

        fn has_room(&self, batch: &[&'static str]) -> bool {
            batch.len() < self.together_max && batch != ["hold"]
        }

        fn may_join(&self, batch: &[&'static str], next: &&'static str) -> bool {
            batch[0].bytes().next() == next.bytes().next()
        }
    }

    fn workers<R: Send + 'static, F: Fn(&'static str) -> R + Send + Sync + 'static>(answer: F, limit_ms: u64) -> Workers<By<F>> {
        let alone = By { answer, together_max: 1, wait: None, batches: Mutex::default() };
        Workers::with_limit("test", Arc::new(alone), Duration::from_millis(limit_ms)).unwrap()
    }

    /// All threads are held by `hold`, and then let go together. What was asked meanwhile waits.
    fn batched<R: Send + 'static>(
        calls: &[&'static str],
        together_max: usize,
        wait: Duration,
        answer: impl Fn(&'static str) -> R + Send + Sync + 'static,
    ) -> (Vec<Result<Option<R>, WorkError>>, Vec<usize>) {
        let (begun_in, begun) = mpsc::channel();
        let (go, held) = mpsc::channel::<()>();
        let held = Mutex::new(held);
        let answer = move |call: &'static str| {
            if call == "hold" {
                begun_in.send(()).unwrap();
                held.lock().unwrap().recv().ok();
                return None;
            }
            Some(answer(call))
        };
        let work = By { answer, together_max, wait: Some(wait), batches: Mutex::default() };
        let workers = Workers::with_limit("test", Arc::new(work), Duration::from_millis(INFERENCE_MS_MAX)).unwrap();
        let threads = workers.0.running.len();
        block_on(async {
            let mut holding = Vec::new();
            for _ in 0..threads {
                let mut hold = Box::pin(workers.run("hold"));
                assert!((&mut hold).now_or_never().is_none());
                begun.recv().unwrap();
                holding.push(hold);
            }
            let mut asked: Vec<_> = calls.iter().map(|call| Box::pin(workers.run(call))).collect();
            for asked in &mut asked {
                assert!(asked.now_or_never().is_none());
            }
            drop(go);
            futures::future::join_all(holding).await;
            let answers = futures::future::join_all(asked).await;
            let batches = workers.0.work.batches.lock().unwrap().split_off(threads);
            (answers, batches)
        })
    }

    #[test]
    fn what_waits_is_computed_together_up_to_the_limit_and_only_what_belongs_together() {
        let calls = ["a1", "a2", "a3", "a4", "a5", "unreadable", "b1", "b2", "a6"];
        for wait in [Duration::ZERO, Duration::from_millis(20)] {
            let (answers, batches) = batched(&calls, 3, wait, |call| call);
            assert_eq!(answers, calls.map(|call| Ok(Some(call))), "each has its own answer");
            assert_eq!(batches.iter().sum::<usize>(), calls.len() - 1, "{batches:?}");
            assert!(batches.iter().all(|together| *together <= 3), "{batches:?}");
            assert!(batches.contains(&3), "{batches:?}");
        }
    }

    #[test]
    fn threads_that_slept_while_one_gathered_help_with_what_is_left() {
        let (begun_in, begun) = mpsc::channel();
        let (go, held) = mpsc::channel::<()>();
        let held = Mutex::new(held);
        let answer = move |call: &'static str| {
            begun_in.send(call).unwrap();
            if call.starts_with('h') {
                held.lock().unwrap().recv().ok();
            }
        };
        let work = By { answer, together_max: 2, wait: Some(Duration::from_secs(3_600)), batches: Mutex::default() };
        let workers = Workers::with_limit("test", Arc::new(work), Duration::from_millis(INFERENCE_MS_MAX)).unwrap();
        let threads = workers.0.running.len();
        if threads == 1 {
            return;
        }
        // All threads that there can be, and asleep.
        let start = |call: &'static str| {
            let mut run = Box::pin(workers.run(call));
            assert!((&mut run).now_or_never().is_none());
            run
        };
        let started: Vec<_> = (0..threads)
            .map(|_| {
                let hold = start("hold");
                begun.recv().unwrap();
                hold
            })
            .collect();
        (0..threads).for_each(|_| go.send(()).unwrap());
        block_on(futures::future::join_all(started));
        while workers.0.queue().idle < threads {
            thread::yield_now();
        }
        // One of them gathers. It gets its second and a lot that cannot join, at once, and then is busy with its two.
        let mut asked = vec![start("h1")];
        while workers.0.queue().gathering == 0 {
            thread::yield_now();
        }
        let mut queue = workers.0.queue();
        let others = std::iter::repeat_n("b", 2 * threads);
        let waiting = std::iter::once("h2").chain(others).map(|call| {
            let (reply, answer) = oneshot::channel();
            queue.waiting.push_back((Request::New(call), Pending { since: Instant::now(), reply }));
            answer
        });
        let waiting: Vec<_> = waiting.collect();
        drop(queue);
        workers.0.joined.notify_one();
        for answer in waiting.into_iter().skip(1) {
            assert_eq!(block_on(answer), Ok(Ok(())), "somebody else computes it");
        }
        (0..2).for_each(|_| go.send(()).unwrap());
        assert_eq!(block_on(asked.remove(0)), Ok(()));
    }

    #[test]
    fn a_panic_in_a_batch_is_told_to_everybody_in_it() {
        let (answers, _) = batched(&["a", "ab", "ac"], 8, Duration::ZERO, |_| assert_eq!(1, 2, "no such thing"));
        for answer in answers {
            let Err(WorkError::Panicked(said)) = answer else { panic!("{answer:?}") };
            assert!(said.contains("no such thing"), "{said}");
        }
    }

    #[test]
    fn a_request_waits_for_others_and_not_for_longer_than_it_may() {
        let patient = By { answer: |call| call, together_max: 2, wait: Some(Duration::from_secs(3_600)), batches: Mutex::default() };
        let workers = Workers::with_limit("test", Arc::new(patient), Duration::from_millis(INFERENCE_MS_MAX)).unwrap();
        // The second comes when the first is gathering, and completes the batch.
        let both = block_on(async {
            let mut first = Box::pin(workers.run("a1"));
            assert!((&mut first).now_or_never().is_none());
            while workers.0.queue().gathering == 0 {
                thread::yield_now();
            }
            futures::future::join(first, workers.run("a2")).await
        });
        assert_eq!(both, (Ok("a1"), Ok("a2")));
        assert_eq!(*workers.0.work.batches.lock().unwrap(), [2]);
        let hurried = By { answer: |call| call, together_max: 2, wait: Some(Duration::from_millis(5)), batches: Mutex::default() };
        let workers = Workers::with_limit("test", Arc::new(hurried), Duration::from_millis(INFERENCE_MS_MAX)).unwrap();
        assert_eq!(block_on(workers.run("alone")), Ok("alone"));
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
        let calls = (0..2 * workers.0.running.len()).map(|_| workers.run("-"));
        for answer in block_on(futures::future::join_all(calls)) {
            assert_eq!(answer, Err(WorkError::Late(20)));
        }
        drop(go);
        assert_eq!(block_on(workers.run("-")), Ok(()), "the threads are there for the next");
    }
}
