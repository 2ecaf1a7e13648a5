//! Leaving a queue group: the one way in which subscriptions end that others would have to stand in for.
//!
//! NATS's client offers three ways, of which two are not safe here (async-nats 0.51, `ConnectionHandler`; `clippy.toml` bans them
//! elsewhere):
//!
//! - *drain* asks the server to end the subscription, and forgets it the next time that anything happens on the connection.
//!   If that is the end of the connection, it subscribes again on the new one, as it has not forgotten yet, and then forgets.
//!   The server goes on to send a share of the group's requests, which nobody reads, until there is another connection. If it is
//!   anything else, such as a publish, what is still on its way is thrown away.
//! - *unsubscribe* (and dropping) forgets first. Nothing is left behind, but what is on its way is thrown away: whoever asked
//!   waits until it asks again.
//! - *unsubscribe after n* lets both sides count. Server and client end it after the same message, so nothing is on its
//!   way when they do, and a new connection is told how many are left. But it ends only if so many come. And the client counts
//!   what it was given over the whole life of the subscription, the server what it has sent on this connection: they
//!   mean the same message only if the subscription was made on the connection on which it ends. Otherwise the client is
//!   done long before the server, forgets the subscription without a word, and nobody can name it to the server any more.
//!
//! So a group is left by count, with a little to spare, if the connection is still the one on which it was joined, and by
//! plainly unsubscribing where it is another one, or where nothing comes any more.

use super::bus::{Message, Subscriber};
use super::connect::Nats;
use super::unavailable;
use crate::error::Result;
use futures::{Stream, StreamExt};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// How many more are taken from a group that is busy: more than can be on their way, counting those that wait to be read.
/// Where more are, it ends like a plain unsubscribe.
const SPARE: u64 = 64;
/// Where nothing comes for so long, hardly anything is on its way.
const QUIET: Duration = Duration::from_millis(50);
/// Where something comes again and again, but not enough of it.
const LONGEST: Duration = Duration::from_secs(1);

/// A subscription as a member of a queue group.
pub(crate) struct Member {
    nats: Nats,
    subscription: Subscriber,
    /// The connection on which the group was joined, or the one before, if it was replaced at that moment.
    joined_on: u64,
    /// Messages that were read.
    taken: u64,
}

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Member").field("joined_on", &self.joined_on).field("taken", &self.taken).finish()
    }
}

impl Member {
    /// Joins the group.
    ///
    /// # Errors
    /// When the subject or the group is none, or the connection is closed for good.
    pub(crate) async fn join(nats: &Nats, subject: String, group: &str) -> Result<Member> {
        let joined_on = nats.connection();
        let subscription = nats.client.queue_subscribe(subject, group.to_owned()).await;
        let subscription = subscription.map_err(|e| unavailable("subscribing", e))?;
        Ok(Member { nats: nats.clone(), subscription, joined_on, taken: 0 })
    }

    /// The next message.
    pub(crate) async fn next(&mut self) -> Option<Message> {
        let message = self.subscription.next().await;
        self.taken += u64::from(message.is_some());
        message
    }
}

enum Leaving {
    Begin,
    Counting { until: Instant },
    Left,
}

/// Leaves the group, and gives what the server has sent or still sends.
///
/// Safe at every point, since the subscription never is where only the server knows of it:
/// - before the count is sent, the client still holds it, and subscribes again on a new connection;
/// - after that, a new connection gets it with what is left of the count; if messages were dropped because too many waited,
///   the server ends it earlier than the client, which then waits in vain for [`QUIET`];
/// - if the connection is replaced after it was looked at and before the client takes the count in, the server of the new one
///   counts further than the client. Mostly nothing comes in that moment, and it is plainly unsubscribed. If so much comes that
///   the client ends it by count, the connection is replaced once more: only what the client knows is subscribed
///   again. What is on its way then is asked again by whoever asked;
/// - when it is unsubscribed, the client forgets it before anything is sent, so no new connection gets it; on this one the server
///   is told before anything else;
/// - if this stream is dropped anywhere, the subscription is dropped, which is the same;
/// - if the process stops in between, nobody reads for so long, as with any subscription, until the server gives the connection up.
pub(crate) fn leave(member: Member) -> impl Stream<Item = Message> + Send {
    let begin = (member, Leaving::Begin);
    futures::stream::unfold(begin, |(mut member, mut at)| async move {
        loop {
            let Member { nats, subscription, joined_on, taken } = &mut member;
            // Each fails only when the connection is closed for good, with all its subscriptions.
            #[allow(clippy::disallowed_methods, reason = "this is the place")]
            match at {
                Leaving::Begin if nats.is_still(*joined_on) => {
                    let _ = subscription.unsubscribe_after(taken.saturating_add(SPARE)).await;
                    at = Leaving::Counting { until: Instant::now() + LONGEST };
                }
                Leaving::Begin => {
                    let _ = subscription.unsubscribe().await;
                    at = Leaving::Left;
                }
                Leaving::Counting { until } => {
                    let quiet = until.min(Instant::now() + QUIET);
                    match timeout_at(quiet, subscription.next()).await {
                        Ok(Some(message)) => return Some((message, (member, at))),
                        Ok(None) => {
                            if nats.connection() != *joined_on {
                                let _ = nats.client.force_reconnect().await;
                            }
                            return None;
                        }
                        Err(_) => {
                            let _ = subscription.unsubscribe().await;
                            at = Leaving::Left;
                        }
                    }
                }
                Leaving::Left => {
                    return subscription.next().await.map(|message| (message, (member, at)));
                }
            }
        }
    })
}

#[cfg(all(test, feature = "cli"))]
mod tests {
    use super::*;
    use crate::nats::NatsOptions;
    use crate::nats::connect::{Nats, Patience};
    use crate::nats::service::ApiService;
    use crate::nats::subjects::Subjects;
    use crate::playground::NatsServer;
    use async_nats::RequestErrorKind;
    use bytes::Bytes;
    use std::net::SocketAddr;
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::watch;

    #[derive(Clone, Copy, PartialEq)]
    enum Link {
        Pass,
        Hold,
        Cut,
    }

    /// A link to NATS of which what the server says can be held back, and which can be cut.
    async fn link(target: SocketAddr) -> (String, watch::Sender<Link>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("nats://{}", listener.local_addr().unwrap());
        let (link, state) = watch::channel(Link::Pass);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                tokio::spawn(carry(near, target, state.clone()));
            }
        });
        (url, link)
    }

    async fn carry(mut near: TcpStream, target: SocketAddr, mut link: watch::Receiver<Link>) {
        let mut far = TcpStream::connect(target).await.unwrap();
        loop {
            let _ = link.wait_for(|link| *link != Link::Hold).await;
            if *link.borrow() == Link::Cut {
                return;
            }
            let _ = tokio::select! {
                copied = tokio::io::copy_bidirectional(&mut near, &mut far) => match copied {
                    Ok(_) | Err(_) => return,
                },
                changed = link.changed() => changed,
            };
        }
    }

    async fn connect(url: &str) -> Nats {
        let patience = Patience::For(Duration::from_secs(10));
        Nats::connect(&NatsOptions::new(url), "test", patience).await.unwrap()
    }

    /// Chaos found a replica that had stopped serving while its connection was lost: its group had a member that never answered.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_group_that_is_left_while_the_connection_is_replaced_has_no_member_that_nobody_reads() {
        let dir = tempfile::tempdir().unwrap();
        let server = NatsServer::start(dir.path()).await.unwrap();
        let (url, link) = link(server.url().trim_start_matches("nats://").parse().unwrap()).await;
        let (member, asker) = (connect(&url).await, connect(&server.url()).await);
        for round in 0..6u64 {
            let subject = format!("work.{round}");
            let group = Member::join(&member, subject.clone(), "group").await.unwrap();
            member.sync().await.unwrap();
            let before = member.connection();
            link.send_replace(Link::Hold);
            let leaving = tokio::spawn(leave(group).count());
            // At each moment of leaving once: before anything is sent, while both count, and afterwards.
            tokio::time::sleep(QUIET * round as u32 / 3).await;
            link.send_replace(Link::Cut);
            tokio::time::sleep(Duration::from_millis(20)).await;
            link.send_replace(Link::Pass);
            leaving.await.unwrap();
            while member.connection() == before || member.sync().await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let request = async_nats::Request::new().timeout(Some(Duration::from_millis(500)));
            let asked = asker.client.send_request(subject, request).await.unwrap_err();
            assert_eq!(asked.kind(), RequestErrorKind::NoResponders, "round {round}: somebody still listens");
        }
    }

    /// It had taken many messages on an earlier connection, which the server of the present one does not know.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_busy_group_that_is_left_after_an_earlier_reconnection_has_no_member_that_nobody_reads() {
        let dir = tempfile::tempdir().unwrap();
        let server = NatsServer::start(dir.path()).await.unwrap();
        let (url, link) = link(server.url().trim_start_matches("nats://").parse().unwrap()).await;
        let (member, asker) = (connect(&url).await, connect(&server.url()).await);
        let mut group = Member::join(&member, "work".into(), "group").await.unwrap();
        member.sync().await.unwrap();
        let publish = |count: usize| {
            let client = asker.client.clone();
            async move {
                for _ in 0..count {
                    client.publish("work", Bytes::new()).await.unwrap();
                }
                client.flush().await.unwrap();
            }
        };
        publish(500).await;
        for _ in 0..500 {
            group.next().await.unwrap();
        }
        let before = member.connection();
        link.send_replace(Link::Cut);
        tokio::time::sleep(Duration::from_millis(20)).await;
        link.send_replace(Link::Pass);
        while member.connection() == before || member.sync().await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        publish(10).await;
        for _ in 0..10 {
            group.next().await.unwrap();
        }
        // It is busy while it leaves.
        let busy = tokio::spawn({
            let client = asker.client.clone();
            async move {
                for _ in 0..300 {
                    client.publish("work", Bytes::new()).await.unwrap();
                    client.flush().await.unwrap();
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        });
        leave(group).count().await;
        busy.await.unwrap();
        member.sync().await.unwrap();
        let request = async_nats::Request::new().timeout(Some(Duration::from_millis(500)));
        let asked = asker.client.send_request("work", request).await.unwrap_err();
        assert_eq!(asked.kind(), RequestErrorKind::NoResponders, "somebody still listens");
    }

    /// Each request costs who asked a quarter of its time if it is lost.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nothing_that_is_on_its_way_is_lost_when_a_busy_group_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let server = NatsServer::start(dir.path()).await.unwrap();
        let (member, asker) = (connect(&server.url()).await, connect(&server.url()).await);
        let join = || Member::join(&member, "work".into(), "group");
        let mut stays = join().await.unwrap();
        member.sync().await.unwrap();
        let (client, answers) = (member.client.clone(), member.client.clone());
        tokio::spawn(async move {
            while let Some(message) = stays.next().await {
                let _ = client.publish(message.reply.unwrap(), Bytes::new()).await;
            }
        });
        let asking: Vec<_> = (0..16)
            .map(|_| {
                let client = asker.client.clone();
                tokio::spawn(async move {
                    for _ in 0..1_000 {
                        client.request("work", Bytes::new()).await.unwrap();
                    }
                })
            })
            .collect();
        let mut times = 0;
        while !asking.iter().all(|asking| asking.is_finished()) {
            let mut group = join().await.unwrap();
            for _ in 0..20 {
                let Ok(Some(message)) = tokio::time::timeout(QUIET, group.next()).await else { break };
                let _ = answers.publish(message.reply.unwrap(), Bytes::new()).await;
            }
            let mut rest = std::pin::pin!(leave(group));
            while let Some(message) = rest.next().await {
                let _ = answers.publish(message.reply.unwrap(), Bytes::new()).await;
            }
            times += 1;
        }
        assert!(times > 5, "it was left {times} times only");
        for asking in asking {
            asking.await.expect("every request is answered");
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_the_service_was_handed_is_still_there_when_it_leaves() {
        let dir = tempfile::tempdir().unwrap();
        let server = NatsServer::start(dir.path()).await.unwrap();
        let (member, asker) = (connect(&server.url()).await, connect(&server.url()).await);
        let subjects = Subjects::new("ruvector").unwrap();
        let service = ApiService::start(&member, &subjects, "n1", &["get"]).await.unwrap();
        member.sync().await.unwrap();
        for _ in 0..50 {
            asker.client.publish(subjects.api("get"), Bytes::new()).await.unwrap();
        }
        asker.sync().await.unwrap();
        member.sync().await.unwrap();
        assert_eq!(service.leave().await.count().await, 50);
    }
}
