//! Runs the lease's state machine: reads and writes the record, pings the holder, keeps the time.

use crate::clock::wall;
use crate::config::LEASE_TTLS;
use crate::error::{Error, Result};
use crate::logic::fencing::is_plausible;
use crate::logic::lease::{Action, CasOutcome, Claim, Event, Lease, Settings};
use crate::model::Term;
use crate::model::events::Event as Story;
use crate::model::records::LeaderRecord;
use crate::model::wire::PingRequest;
use crate::mutant::mutant;
use crate::nats::bucket::{Cas, Found, Versioned};
use crate::node::causes::{Severity, Subject};
use crate::node::context::{Context, Leading};
use crate::node::leader;
use crate::node::replica::ping_outcome;
use crate::node::restore::restore_buckets;
use crate::view::{LEADER_KEY, View, parse};
use futures::FutureExt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// Commands to the lease from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Give leadership up, if we have it.
    Resign,
}

/// How long a ping of the holder may take.
const PING: Duration = Duration::from_millis(500);

/// Runs until the node stops, then releases the lease if it is ours.
pub(crate) async fn run(
    ctx: Arc<Context>,
    mut orders: mpsc::Receiver<Order>,
    resign: mpsc::Sender<Order>,
    stop: CancellationToken,
) {
    let settings = Settings {
        instance: ctx.instance,
        ttl: ctx.config.lease_ttl,
        ping_gap: ctx.config.heartbeat_interval,
        early_takeover: ctx.config.early_takeover,
    };
    let (answers, mut answered) = mpsc::channel(16);
    let mut driver = Driver {
        lease: Lease::new(settings, ctx.clock.now()),
        ctx: ctx.clone(),
        answers,
        leader: None,
        acquired: (0, wall()),
        before: (u64::MAX, Before { term: None, view: ctx.view() }),
        resign,
    };
    let mut connected = ctx.control.nats.connected();
    let mut views = ctx.views.subscribe();
    // The map that we kept may name a later term than a lease record that NATS has lost.
    let kept = views.borrow().term;
    driver.feed(Event::TermSeen(ctx.saw_term(kept))).await;
    driver.feed(Event::Tick).await;
    let mut stopping = false;
    let mut watched = 0;
    loop {
        let now = ctx.clock.now();
        let due = ctx.clock.instant(driver.lease.next_deadline(now));
        let event = tokio::select! {
            biased;
            () = stop.cancelled(), if !stopping => { stopping = true; Event::Resign }
            Some(event) = answered.recv() => event,
            changed = connected.changed() => {
                if changed.is_err() { return }
                if *connected.borrow_and_update() { Event::Tick } else { Event::Disconnected }
            }
            Some(Order::Resign) = orders.recv() => {
                // Why it resigns may be a term that it has just heard of.
                driver.feed(Event::TermSeen(ctx.saw_term(0))).await;
                Event::Resign
            }
            changed = views.changed() => {
                if changed.is_err() { return }
                let view = views.borrow_and_update().clone();
                driver.feed(Event::TermSeen(ctx.saw_term(view.term))).await;
                // A watch may lag or be of a bucket that was wiped: it only says when to look.
                let touched = view.lease_touched;
                if std::mem::replace(&mut watched, touched) == touched { Event::Tick } else { Event::Changed }
            }
            () = tokio::time::sleep_until(due) => Event::Tick,
        };
        driver.feed(event).await;
        if stopping && (driver.lease.valid_until().is_none() || !ctx.control.nats.is_connected()) {
            driver.step_down("stopping");
            return;
        }
    }
}

/// What a new leader knows of the time before it asked for the lease.
#[derive(Debug, Clone)]
pub(crate) struct Before {
    /// Whose place in the lease's record it has taken: see [`signing`](crate::logic::signing).
    pub(crate) term: Option<Term>,
    /// The map, before anything could be in it that says to be of the new term.
    pub(crate) view: Arc<View>,
}

struct Driver {
    lease: Lease,
    ctx: Arc<Context>,
    answers: mpsc::Sender<Event>,
    leader: Option<CancellationToken>,
    acquired: (Term, chrono::DateTime<chrono::Utc>),
    /// What was when the lease was first asked for at this revision.
    before: (u64, Before),
    resign: mpsc::Sender<Order>,
}

impl Driver {
    async fn feed(&mut self, event: Event) {
        let actions = self.lease.on_event(self.ctx.clock.now(), event);
        for action in actions {
            self.act(action);
        }
        let leading = self.lease.leading(self.ctx.clock.now()).zip(self.lease.valid_until());
        let leading = leading.map(|(term, until)| Leading { term, until });
        self.ctx.leading.send_if_modified(|known| {
            let changed = *known != leading;
            *known = leading;
            changed
        });
        self.ctx.metrics.is_leader.set(leading.is_some().into());
        if let Some(leading) = leading {
            self.ctx.saw_term(leading.term);
        }
    }

    fn act(&mut self, action: Action) {
        let (ctx, answers) = (self.ctx.clone(), self.answers.clone());
        match action {
            Action::Read => drop(self.ctx.tasks.spawn(async move {
                let event = match ctx.buckets.cluster.look(LEADER_KEY).await {
                    Ok(Found::Nothing) => Event::Seen(None),
                    Ok(Found::Deleted(revision)) => {
                        warn!(revision, "somebody has deleted the leader's record");
                        Event::Spoilt(revision)
                    }
                    Ok(Found::Value(found)) => read(&ctx, &found),
                    Err(Error::NotFound(_)) => {
                        if let Err(error) = restore_buckets(&ctx).await {
                            debug!("{error}");
                        }
                        Event::ReadFailed
                    }
                    Err(error) => {
                        // A cause by itself: what this bucket does not do is known to `nats::trouble`, and raised by
                        // `node::watchdog`.
                        debug!("reading the lease: {error}");
                        Event::ReadFailed
                    }
                };
                let _ = answers.send(event).await;
            })),
            Action::Cas { expected, claim, term } => {
                if claim == Claim::Acquire {
                    if self.before.0 != expected {
                        let before = Before { term: self.lease.term_at(expected), view: self.ctx.view() };
                        self.before = (expected, before);
                    }
                    self.acquired = (term, wall());
                }
                let record = self.record(claim, term);
                self.ctx.tasks.spawn(async move {
                    let outcome = match serde_json::to_vec(&record) {
                        Ok(value) => match ctx.buckets.cluster.cas(LEADER_KEY, value, expected).await {
                            Cas::Applied(revision) => CasOutcome::Applied(revision),
                            Cas::Lost => CasOutcome::Lost,
                            Cas::Unknown(error) => {
                                // As above.
                                debug!("writing the lease: {error}");
                                CasOutcome::Unknown
                            }
                        },
                        Err(_) => CasOutcome::Lost,
                    };
                    let _ = answers.send(Event::Cas(outcome)).await;
                });
            }
            Action::Ping(node) => drop(self.ctx.tasks.spawn(async move {
                let subject = ctx.subjects.node(&node, "ping");
                let asked = ctx.control.ask(subject, &PingRequest::default(), PING).await;
                let _ = answers.send(Event::Pinged(ping_outcome(&asked))).await;
            })),
            Action::Elected(term) => self.elected(term),
            Action::SteppedDown(why) => self.step_down(why),
        }
    }

    fn record(&self, claim: Claim, term: Term) -> LeaderRecord {
        let held = claim != Claim::Release;
        LeaderRecord {
            node: held.then(|| self.ctx.node.clone()),
            instance: held.then_some(self.ctx.instance),
            term,
            acquired_at: self.acquired.1,
            renewed_at: wall(),
            ttl_ms: self.ctx.config.lease_ttl.as_millis() as u64,
        }
    }

    fn elected(&mut self, term: Term) {
        self.step_down("a new term begins");
        info!(term, "leader");
        let stop = self.ctx.stop.child_token();
        self.leader = Some(stop.clone());
        // Of this claim: another one may come to the same revision, in a bucket that went back in time.
        let before = std::mem::replace(&mut self.before.1, Before { term: None, view: self.ctx.view() });
        self.before.0 = u64::MAX;
        let (ctx, resign) = (self.ctx.clone(), self.resign.clone());
        self.ctx.tasks.spawn(async move {
            let story = Story::new("leader.elected", format!("{} leads in term {term}", ctx.node));
            ctx.event(Story { term: Some(term), ..story.node(&ctx.node) }).await;
            // Whoever holds the lease leads, or lets others: a bug must not leave everybody without a leader. What
            // the leader knew goes with it.
            let causes = ctx.causes.clone();
            let led = AssertUnwindSafe(leader::run(ctx.clone(), term, before)).catch_unwind();
            let ended = tokio::select! {
                () = stop.cancelled() => None,
                ended = led => {
                    Some(ended.unwrap_or_else(|_| Err(Error::Internal("the leader panicked".into()))))
                }
            };
            causes.end_leading();
            if let Some(Err(error)) = ended {
                warn!(term, "cannot lead: {error}");
                let text = format!("{} was elected and cannot lead: {error}", ctx.node);
                causes.retry("cannot_lead", Subject::Node, Severity::Yellow, text);
                // Somebody else may do better; nothing is lost by handing over.
                let _ = resign.send(Order::Resign).await;
            }
        });
    }

    fn step_down(&mut self, why: &'static str) {
        let Some(stop) = self.leader.take() else { return };
        if !mutant("no-fencing") {
            stop.cancel();
        }
        warn!("not leader any more: {why}");
        let ctx = self.ctx.clone();
        self.ctx.tasks.spawn(async move {
            let story =
                Story::new("leader.stepped_down", format!("{} does not lead any more: {why}", ctx.node));
            ctx.event(story.node(&ctx.node)).await;
        });
    }
}

/// Garbage under the key names nobody, and is no free lease: see [`crate::logic::lease`].
fn read(ctx: &Context, found: &Versioned) -> Event {
    let record: Result<LeaderRecord> = parse(&found.value).and_then(|record: LeaderRecord| {
        let known = ctx.term.load(Ordering::Relaxed).max(ctx.view().term);
        let sane = is_plausible(known, record.term)
            && record.node.is_some() == record.instance.is_some()
            && LEASE_TTLS.contains(&u128::from(record.ttl_ms));
        if sane { Ok(record) } else { Err(Error::Invalid("the lease makes no sense".into())) }
    });
    match record {
        Ok(record) => Event::Seen(Some((found.revision, record))),
        Err(error) => {
            ctx.bad_message("record", "?", &error);
            Event::Spoilt(found.revision)
        }
    }
}
