//! The event loops of the data plane: one thread each, with its own sockets, tasks and timers, so that a request is served from its
//! first byte to its last without a lock, and without a thread being woken.
//!
//! ```text
//! turn:  run what is ready ─ take what other threads sent ─ epoll_wait ─ read the clock once ─ ring timers ─ read ahead, wake tasks
//! ```
//!
//! - A socket is registered once, for both directions, edge-triggered. Whether it can be read is a flag that an event sets and a short
//!   read clears ([`Stream`]), so a request costs no `epoll_ctl` and no `recv` that only sees `EAGAIN`.
//! - What a task waits to read is read when the event comes, before the tasks of a turn are run: sixteen reads in a row and then sixteen
//!   answers cost less than each after the other, as the system's code for either stays in the caches.
//! - Tasks are plain futures ([`spawn`]); they never leave their thread. Wakers do: what is woken from elsewhere comes back through a
//!   queue and an eventfd.
//! - [`now`] is the time at which the turn began. Deadlines are measured by it, latencies are not.
//!
//! It is epoll by way of rustix, and so Linux: a portable poller does not say that the other side has closed (`EPOLLRDHUP`), and without
//! that a short read may not clear the flag, or the end of a connection that came together with data is never seen.

pub(crate) mod buffers;
pub(crate) mod places;
mod socket;
mod timers;

#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use async_task::{Runnable, Task};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};

pub use socket::Stream;
pub use timers::Deadline;

use places::Places;
use socket::Source;
use timers::Timers;

/// Tasks that are run before the sockets are looked at again.
const RUNS_PER_TURN_MAX: usize = 256;
/// Events that are taken at once.
const EVENTS_PER_TURN_MAX: usize = 256;
/// The number under which the eventfd is registered; sockets count up from 0.
const WAKE_UP: u64 = u64::MAX;

thread_local! {
    static CURRENT: RefCell<Option<Rc<Local>>> = const { RefCell::new(None) };
    /// Which of the process's loops this thread is, for per-thread statistics; 0 on all other threads.
    static NUMBER: Cell<usize> = const { Cell::new(0) };
}

/// Loops that have been started in this process.
static STARTED: AtomicUsize = AtomicUsize::new(0);

/// One loop, seen from its own thread.
struct Local {
    shared: Arc<Shared>,
    ready: RefCell<VecDeque<Runnable>>,
    epoll: OwnedFd,
    sources: RefCell<Places<Rc<Source>>>,
    timers: RefCell<Timers>,
    /// Every task that has not ended, so that none outlives the loop.
    tasks: RefCell<Places<Waker>>,
    now: Cell<Instant>,
}

/// What other threads see of a loop.
struct Shared {
    wake_up: OwnedFd,
    /// It waits for events, or is about to, and has to be woken.
    asleep: AtomicBool,
    /// `None` when the loop has ended.
    incoming: Mutex<Option<Vec<Incoming>>>,
}

enum Incoming {
    /// A task that was woken from another thread.
    Runnable(Runnable),
    /// Something to be done on the loop's thread.
    Job(Box<dyn FnOnce() + Send>),
}

impl Shared {
    fn incoming(&self) -> MutexGuard<'_, Option<Vec<Incoming>>> {
        self.incoming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, incoming: Incoming) {
        match self.incoming().as_mut() {
            Some(all) => all.push(incoming),
            // Nobody takes it, and what it holds must not wait for ever.
            None => return,
        }
        self.rouse();
    }

    fn rouse(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            // It fails only if the counter is full, and then the loop is as good as woken.
            let _ = rustix::io::write(&self.wake_up, &1u64.to_ne_bytes());
        }
    }

    fn take(&self) -> Vec<Incoming> {
        self.incoming().as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn is_empty(&self) -> bool {
        self.incoming().as_ref().is_none_or(Vec::is_empty)
    }
}

/// The future that a loop runs for: woken from anywhere.
struct Main {
    shared: Arc<Shared>,
    woken: AtomicBool,
}

impl Wake for Main {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::SeqCst);
        self.shared.rouse();
    }
}

impl Local {
    fn new() -> io::Result<Rc<Local>> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake_up = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &wake_up, EventData::new_u64(WAKE_UP), EventFlags::IN | EventFlags::ET)?;
        let shared = Arc::new(Shared { wake_up, asleep: AtomicBool::new(false), incoming: Mutex::new(Some(Vec::new())) });
        Ok(Rc::new(Local {
            shared,
            ready: RefCell::default(),
            epoll,
            sources: RefCell::default(),
            timers: RefCell::default(),
            tasks: RefCell::default(),
            now: Cell::new(Instant::now()),
        }))
    }

    /// Runs tasks that are ready, those among them that become so meanwhile, up to the limit of a turn.
    fn run_ready(&self) {
        for _ in 0..RUNS_PER_TURN_MAX {
            // Taken out first: the task may make others ready.
            let Some(runnable) = self.ready.borrow_mut().pop_front() else { return };
            runnable.run();
        }
    }

    /// The tasks that other threads have woken, and nothing else of what they sent.
    fn take_woken_elsewhere(&self) {
        for incoming in self.shared.take() {
            if let Incoming::Runnable(runnable) = incoming {
                self.ready.borrow_mut().push_back(runnable);
            }
        }
    }

    fn take_incoming(&self) {
        for incoming in self.shared.take() {
            match incoming {
                Incoming::Runnable(runnable) => self.ready.borrow_mut().push_back(runnable),
                Incoming::Job(job) => job(),
            }
        }
    }

    /// Waits for events, unless there is something to do already, and wakes those who wait for them.
    fn turn(&self, events: &mut Vec<epoll::Event>, busy: impl Fn() -> bool) -> io::Result<()> {
        self.shared.asleep.store(true, Ordering::SeqCst);
        let busy = busy() || !self.ready.borrow().is_empty() || !self.shared.is_empty();
        let wait = match busy {
            true => Some(Duration::ZERO),
            false => self.timers.borrow().next().map(|at| at.saturating_duration_since(Instant::now())),
        };
        let wait = wait.and_then(|wait| Timespec::try_from(wait).ok());
        events.clear();
        let waited = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(events), wait.as_ref());
        self.shared.asleep.store(false, Ordering::SeqCst);
        match waited {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let now = Instant::now();
        self.now.set(now);
        loop {
            // Taken out first: a waker may set a timer.
            let due = self.timers.borrow_mut().due(now);
            let Some(waker) = due else { break };
            waker.wake();
        }
        for event in events.iter() {
            let (number, flags) = (event.data, event.flags);
            match number.u64() {
                WAKE_UP => {
                    let mut counter = [0; 8];
                    let _ = rustix::io::read(&self.shared.wake_up, &mut counter);
                }
                number => {
                    let source = usize::try_from(number).ok().and_then(|number| self.sources.borrow().get(number).cloned());
                    if let Some(source) = source {
                        source.happened(flags);
                    }
                }
            }
        }
        Ok(())
    }
}

fn current<T>(use_it: impl FnOnce(&Rc<Local>) -> T) -> Option<T> {
    CURRENT.with(|current| current.borrow().as_ref().map(use_it))
}

fn expect_current() -> Rc<Local> {
    #[expect(clippy::expect_used, reason = "whoever calls is a task of a loop, or says so in its documentation")]
    current(Rc::clone).expect("on the thread of an event loop")
}

/// Takes the thread's loop away also if a task panics.
struct Entered;

impl Drop for Entered {
    fn drop(&mut self) {
        // All tasks are woken, and given back to be dropped: on their own thread, and while there still is a loop.
        loop {
            let tasks: Vec<Waker> = current(|local| local.tasks.borrow().iter().cloned().collect()).unwrap_or_default();
            if tasks.is_empty() {
                break;
            }
            tasks.iter().for_each(Waker::wake_by_ref);
            let woken = current(|local| {
                local.take_woken_elsewhere();
                std::mem::take(&mut *local.ready.borrow_mut())
            });
            drop(woken);
        }
        let local = CURRENT.with(|current| current.borrow_mut().take());
        let unheard = local.and_then(|local| local.shared.incoming().take());
        drop(unheard);
    }
}

/// Runs a loop on this thread until the future is done. Panics if one runs on it already.
pub fn run<T>(future: impl Future<Output = T>) -> io::Result<T> {
    let local = Local::new()?;
    CURRENT.with(|current| {
        let mut current = current.borrow_mut();
        assert!(current.is_none(), "one loop a thread");
        *current = Some(Rc::clone(&local));
    });
    let _entered = Entered;
    let mut future = pin!(future);
    let main = Arc::new(Main { shared: Arc::clone(&local.shared), woken: AtomicBool::new(true) });
    let waker = Waker::from(Arc::clone(&main));
    let mut context = Context::from_waker(&waker);
    let mut events = Vec::with_capacity(EVENTS_PER_TURN_MAX);
    loop {
        if main.woken.swap(false, Ordering::SeqCst)
            && let Poll::Ready(value) = future.as_mut().poll(&mut context)
        {
            return Ok(value);
        }
        local.run_ready();
        local.turn(&mut events, || main.woken.load(Ordering::SeqCst))?;
        local.take_incoming();
    }
}

/// Runs a task on this thread's loop. Dropped, the handle cancels it; [`Task::detach`] lets it run. Panics where there is no loop.
pub fn spawn<T: 'static>(future: impl Future<Output = T> + 'static) -> Task<T> {
    let local = expect_current();
    let home = Arc::clone(&local.shared);
    let schedule = move |runnable: Runnable| {
        let mut runnable = Some(runnable);
        // `None` on a thread without a loop.
        let _ = current(|local| {
            if Arc::ptr_eq(&local.shared, &home) {
                local.ready.borrow_mut().extend(runnable.take());
            }
        });
        if let Some(runnable) = runnable {
            home.push(Incoming::Runnable(runnable));
        }
    };
    // The number is known when there is a waker, which is before the future is polled.
    let listed = Rc::new(Listed { home: Rc::downgrade(&local), number: Cell::new(None) });
    let until_dropped = Rc::clone(&listed);
    let (runnable, task) = async_task::spawn_local(
        async move {
            let _listed = until_dropped;
            future.await
        },
        schedule,
    );
    listed.number.set(Some(local.tasks.borrow_mut().add(runnable.waker())));
    drop(listed);
    runnable.schedule();
    task
}

/// A task's place among those that have not ended.
struct Listed {
    home: Weak<Local>,
    number: Cell<Option<usize>>,
}

impl Drop for Listed {
    fn drop(&mut self) {
        if let (Some(home), Some(number)) = (self.home.upgrade(), self.number.get()) {
            let waker = home.tasks.borrow_mut().remove(number);
            drop(waker);
        }
    }
}

/// The time at which this turn of the loop began. Panics where there is no loop.
pub fn now() -> Instant {
    CURRENT.with(|current| current.borrow().as_ref().map(|local| local.now.get())).unwrap_or_else(Instant::now)
}

/// Which of the process's loops this is, counted from 1; 0 on all other threads.
pub fn number() -> usize {
    NUMBER.get()
}

/// Lets the loop's other tasks and sockets have their turn.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// A loop on a thread of its own. It ends when this is dropped.
pub struct EventLoop {
    handle: Handle,
    stop: Arc<Stop>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Where another thread sends a loop something to do.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// Whether the loop has ended, which it does before it is told to if something panics, or the system refuses it.
    pub fn has_ended(&self) -> bool {
        self.0.incoming().is_none()
    }

    /// Does something on the loop's thread, such as [`spawn`]. If the loop has ended it is dropped.
    pub fn send(&self, job: impl FnOnce() + Send + 'static) {
        self.0.push(Incoming::Job(Box::new(job)));
    }
}

#[derive(Default)]
struct Stop {
    told: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl Future for &Stop {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        *self.waker.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
        if self.told.load(Ordering::SeqCst) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl EventLoop {
    /// Starts one on a thread of this name, which `within` may prepare before it runs what it is given, to the end.
    pub fn start(name: &str, within: impl FnOnce(Box<dyn FnOnce() + Send>) + Send + 'static) -> io::Result<EventLoop> {
        let (tell, told) = std::sync::mpsc::channel();
        let stop = Arc::new(Stop::default());
        let stopped = Arc::clone(&stop);
        let number = STARTED.fetch_add(1, Ordering::Relaxed) + 1;
        let looping = move || {
            NUMBER.set(number);
            let telling = tell.clone();
            let ran = run(async move {
                let _ = telling.send(current(|local| Handle(Arc::clone(&local.shared))).ok_or(io::ErrorKind::Other.into()));
                (&*stopped).await;
            });
            if let Err(error) = ran {
                said!(log::error!(event = "event_loop_ended"; "an event loop of the data plane has ended: {error}"));
                let _ = tell.send(Err(error));
            }
        };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || within(Box::new(looping)))?;
        let handle = told.recv().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))?;
        Ok(EventLoop { handle, stop, thread: Some(thread) })
    }

    /// What sends it something to do.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.stop.told.store(true, Ordering::SeqCst);
        if let Some(waker) = self.stop.waker.lock().unwrap_or_else(PoisonError::into_inner).take() {
            waker.wake();
        }
        if let Some(thread) = self.thread.take() {
            // An error says that it panicked, which has been said.
            let _ = thread.join();
        }
    }
}
