//! Runs processes as tasks in virtual time: one event after the other, all chance from one seed.
//!
//! A process may die at every `await` (its tasks are dropped), or be stopped there and go on later: what
//! happens to it meanwhile waits for it. Its clock runs a little fast or slow, and never jumps.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

pub(crate) type Task = Pin<Box<dyn Future<Output = ()>>>;
type Act = Box<dyn FnOnce()>;

/// One run of a process.
pub(crate) type ProcId = u64;
/// Whoever is not simulated as a process: clients.
pub(crate) const OUTSIDE: ProcId = 0;

enum What {
    Wake(u64),
    Act(Act),
}

struct Proc {
    stopped: bool,
    /// What arrived while it was stopped.
    backlog: Vec<What>,
    rate: f64,
}

#[derive(Default)]
struct Core {
    now: Duration,
    order: u64,
    queue: BTreeMap<(Duration, u64), What>,
    procs: BTreeMap<ProcId, Proc>,
    spawned: Vec<(u64, ProcId, Task)>,
    killed: Vec<u64>,
    owner: BTreeMap<u64, ProcId>,
    next: u64,
    steps: u64,
    failure: Option<String>,
}

/// The executor; cheap to clone.
#[derive(Clone)]
pub(crate) struct Exec {
    core: Rc<RefCell<Core>>,
    rng: Rc<RefCell<fastrand::Rng>>,
    current: Rc<Cell<u64>>,
    pub(crate) trace: bool,
}

impl Exec {
    pub(crate) fn new(seed: u64, trace: bool) -> Exec {
        let exec = Exec {
            core: Rc::default(),
            rng: Rc::new(RefCell::new(fastrand::Rng::with_seed(seed))),
            current: Rc::new(Cell::new(0)),
            trace,
        };
        exec.core.borrow_mut().procs.insert(OUTSIDE, Proc { stopped: false, backlog: vec![], rate: 1.0 });
        exec
    }

    pub(crate) fn now(&self) -> Duration {
        self.core.borrow().now
    }

    pub(crate) fn steps(&self) -> u64 {
        self.core.borrow().steps
    }

    /// A number below `n`.
    pub(crate) fn below(&self, n: u64) -> u64 {
        self.rng.borrow_mut().u64(0..n.max(1))
    }

    pub(crate) fn chance(&self, per_mille: u64) -> bool {
        self.below(1_000) < per_mille
    }

    pub(crate) fn pick<'a, T>(&self, of: &'a [T]) -> Option<&'a T> {
        of.get(self.below(of.len() as u64) as usize)
    }

    pub(crate) fn uuid(&self) -> uuid::Uuid {
        uuid::Uuid::from_u128(self.rng.borrow_mut().u128(1..))
    }

    /// An invariant does not hold: the run ends here.
    pub(crate) fn fail(&self, why: String) {
        self.note(|| format!("FAILED: {why}"));
        self.core.borrow_mut().failure.get_or_insert(why);
    }

    pub(crate) fn failure(&self) -> Option<String> {
        self.core.borrow().failure.clone()
    }

    pub(crate) fn note(&self, what: impl FnOnce() -> String) {
        if self.trace {
            eprintln!("{:>9.3}  {}", self.now().as_secs_f64(), what());
        }
    }

    fn push(&self, at: Duration, what: What) {
        let mut core = self.core.borrow_mut();
        core.order += 1;
        let key = (at.max(core.now), core.order);
        core.queue.insert(key, what);
    }

    /// Does something outside of all processes after a while: at a server, in the network.
    pub(crate) fn after(&self, delay: Duration, act: impl FnOnce() + 'static) {
        self.push(self.now() + delay, What::Act(Box::new(act)));
    }

    /// Does something inside a process: when it goes on, if it is stopped; never, if it is dead.
    pub(crate) fn inside(&self, proc: ProcId, act: impl FnOnce() + 'static) {
        let stopped = match self.core.borrow().procs.get(&proc) {
            None => return,
            Some(known) => known.stopped,
        };
        if stopped {
            let mut core = self.core.borrow_mut();
            if let Some(known) = core.procs.get_mut(&proc) {
                known.backlog.push(What::Act(Box::new(act)));
            }
        } else {
            act();
        }
    }

    pub(crate) fn start(&self, rate: f64) -> ProcId {
        let mut core = self.core.borrow_mut();
        core.next += 1;
        let id = core.next;
        core.procs.insert(id, Proc { stopped: false, backlog: vec![], rate });
        id
    }

    pub(crate) fn kill(&self, proc: ProcId) {
        let mut core = self.core.borrow_mut();
        core.procs.remove(&proc);
        let tasks: Vec<u64> = core.owner.iter().filter(|(_, p)| **p == proc).map(|(t, _)| *t).collect();
        core.killed.extend(tasks);
    }

    pub(crate) fn stop(&self, proc: ProcId, stopped: bool) {
        let backlog = match self.core.borrow_mut().procs.get_mut(&proc) {
            None => return,
            Some(known) => {
                known.stopped = stopped;
                if stopped { vec![] } else { std::mem::take(&mut known.backlog) }
            }
        };
        for what in backlog {
            self.push(self.now(), what);
        }
    }

    pub(crate) fn is_stopped(&self, proc: ProcId) -> bool {
        self.core.borrow().procs.get(&proc).is_none_or(|p| p.stopped)
    }

    fn rate(&self, proc: ProcId) -> f64 {
        self.core.borrow().procs.get(&proc).map_or(1.0, |p| p.rate)
    }

    /// The process's own monotonic clock.
    pub(crate) fn local(&self, proc: ProcId) -> Duration {
        self.now().mul_f64(self.rate(proc))
    }

    pub(crate) fn spawn(&self, proc: ProcId, task: impl Future<Output = ()> + 'static) -> u64 {
        let mut core = self.core.borrow_mut();
        core.next += 1;
        let id = core.next;
        core.owner.insert(id, proc);
        core.spawned.push((id, proc, Box::pin(task)));
        drop(core);
        self.push(self.now(), What::Wake(id));
        id
    }

    pub(crate) fn cancel(&self, task: u64) {
        self.core.borrow_mut().killed.push(task);
    }

    /// Sleeps by the process's own clock.
    pub(crate) async fn sleep(&self, proc: ProcId, pause: Duration) {
        let until = self.now() + pause.div_f64(self.rate(proc)) + Duration::from_nanos(1);
        let mut asked = false;
        std::future::poll_fn(|_| {
            if self.now() >= until {
                return Poll::Ready(());
            }
            if !std::mem::replace(&mut asked, true) {
                self.push(until, What::Wake(self.current.get()));
            }
            Poll::Pending
        })
        .await;
    }

    /// Runs until `end`, or until something fails; `check` looks after every step.
    pub(crate) fn run(&self, end: Duration, tasks: &mut Tasks, mut check: impl FnMut()) {
        let mut context = Context::from_waker(Waker::noop());
        loop {
            {
                let mut core = self.core.borrow_mut();
                for (id, proc, task) in std::mem::take(&mut core.spawned) {
                    tasks.0.insert(id, (proc, task));
                }
            }
            let killed = std::mem::take(&mut self.core.borrow_mut().killed);
            for id in killed {
                self.core.borrow_mut().owner.remove(&id);
                // Dropping a task may drop more: not under a borrow.
                drop(tasks.0.remove(&id));
            }
            let what = {
                let mut core = self.core.borrow_mut();
                let Some((&(at, order), _)) = core.queue.first_key_value() else { return };
                if at > end || core.failure.is_some() {
                    core.now = core.now.max(end.min(at));
                    return;
                }
                core.now = at;
                core.steps += 1;
                core.queue.remove(&(at, order))
            };
            match what {
                None => {}
                Some(What::Act(act)) => act(),
                Some(What::Wake(id)) => {
                    let Some((proc, task)) = tasks.0.get_mut(&id) else { continue };
                    let mut core = self.core.borrow_mut();
                    match core.procs.get_mut(proc) {
                        None => continue,
                        Some(known) if known.stopped => {
                            known.backlog.push(What::Wake(id));
                            continue;
                        }
                        Some(_) => drop(core),
                    }
                    self.current.set(id);
                    if task.as_mut().poll(&mut context).is_ready() {
                        drop(tasks.0.remove(&id));
                        self.core.borrow_mut().owner.remove(&id);
                    }
                }
            }
            check();
        }
    }

    /// Breaks the circles of references.
    pub(crate) fn clear(&self) {
        let queue = std::mem::take(&mut self.core.borrow_mut().queue);
        let procs = std::mem::take(&mut self.core.borrow_mut().procs);
        let spawned = std::mem::take(&mut self.core.borrow_mut().spawned);
        drop((queue, procs, spawned));
    }
}

/// All tasks that run.
#[derive(Default)]
pub(crate) struct Tasks(BTreeMap<u64, (ProcId, Task)>);

/// Wakes whoever waits for a change of something.
#[derive(Clone)]
pub(crate) struct Signal {
    exec: Exec,
    version: Rc<Cell<u64>>,
    waiting: Rc<RefCell<Vec<u64>>>,
}

impl Signal {
    pub(crate) fn new(exec: &Exec) -> Signal {
        Signal { exec: exec.clone(), version: Rc::default(), waiting: Rc::default() }
    }

    pub(crate) fn raise(&self) {
        self.version.set(self.version.get() + 1);
        for task in self.waiting.borrow_mut().drain(..) {
            self.exec.push(self.exec.now(), What::Wake(task));
        }
    }

    pub(crate) fn version(&self) -> u64 {
        self.version.get()
    }

    /// Waits until it is raised after `seen`, or for a while.
    pub(crate) async fn changed(&self, proc: ProcId, seen: u64, limit: Duration) {
        let raised = std::future::poll_fn(|_| {
            if self.version.get() != seen {
                return Poll::Ready(());
            }
            let task = self.exec.current.get();
            let mut waiting = self.waiting.borrow_mut();
            if !waiting.contains(&task) {
                waiting.push(task);
            }
            Poll::Pending
        });
        either(raised, self.exec.sleep(proc, limit)).await;
    }
}

/// A place for one answer.
pub(crate) struct Slot<T> {
    value: Rc<RefCell<Option<T>>>,
    signal: Signal,
}

impl<T> Clone for Slot<T> {
    fn clone(&self) -> Self {
        Slot { value: self.value.clone(), signal: self.signal.clone() }
    }
}

impl<T> Slot<T> {
    pub(crate) fn new(exec: &Exec) -> Self {
        Slot { value: Rc::default(), signal: Signal::new(exec) }
    }

    pub(crate) fn set(&self, value: T) {
        *self.value.borrow_mut() = Some(value);
        self.signal.raise();
    }

    /// The answer, if it comes in time.
    pub(crate) async fn wait(&self, proc: ProcId, limit: Duration) -> Option<T> {
        self.signal.changed(proc, 0, limit).await;
        self.value.borrow_mut().take()
    }
}

/// A queue into a task.
pub(crate) struct Mailbox<T> {
    queue: Rc<RefCell<VecDeque<T>>>,
    signal: Signal,
}

impl<T> Clone for Mailbox<T> {
    fn clone(&self) -> Self {
        Mailbox { queue: self.queue.clone(), signal: self.signal.clone() }
    }
}

impl<T> Mailbox<T> {
    pub(crate) fn new(exec: &Exec) -> Self {
        Mailbox { queue: Rc::default(), signal: Signal::new(exec) }
    }

    pub(crate) fn push(&self, value: T) {
        self.queue.borrow_mut().push_back(value);
        self.signal.raise();
    }

    pub(crate) fn pop(&self) -> Option<T> {
        self.queue.borrow_mut().pop_front()
    }

    pub(crate) async fn next(&self, proc: ProcId, limit: Duration) -> Option<T> {
        if let Some(value) = self.pop() {
            return Some(value);
        }
        self.signal.changed(proc, self.signal.version(), limit).await;
        self.pop()
    }
}

/// Waits for the first of two; both are asked at every step.
pub(crate) async fn either(a: impl Future<Output = ()>, b: impl Future<Output = ()>) {
    let (mut a, mut b) = (Box::pin(a), Box::pin(b));
    std::future::poll_fn(|context| {
        let first = a.as_mut().poll(context).is_ready();
        if first || b.as_mut().poll(context).is_ready() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}
