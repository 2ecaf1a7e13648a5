//! The timeline as a stream: live, or from the stream that keeps it for a week.

use super::connect::Nats;
use super::subjects::Subjects;
use super::unavailable;
use crate::error::Result;
use crate::model::events::Event;
#[cfg(feature = "cli")]
use async_nats::jetstream::consumer::{DeliverPolicy, pull};
#[cfg(feature = "cli")]
use chrono::{DateTime, Utc};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use std::pin::Pin;
use std::task::{Context, Poll};

/// Events, oldest first. Messages that do not parse are left out.
pub struct EventStream {
    events: BoxStream<'static, Event>,
}

impl EventStream {
    /// Everything from now on.
    pub(crate) async fn live(nats: &Nats, subjects: &Subjects) -> Result<EventStream> {
        let messages =
            nats.client.subscribe(subjects.all_events()).await.map_err(|e| unavailable("subscribing", e))?;
        nats.flush().await?;
        let parse =
            |message: async_nats::Message| async move { serde_json::from_slice(&message.payload).ok() };
        Ok(EventStream { events: messages.filter_map(parse).boxed() })
    }

    /// Kept events since a time, for the command line; ends where the timeline ends unless `follow`.
    #[cfg(feature = "cli")]
    pub(crate) async fn since(
        nats: &Nats,
        subjects: &Subjects,
        since: Option<DateTime<Utc>>,
        follow: bool,
    ) -> Result<EventStream> {
        let name = subjects.event_stream();
        let about = format!(".{name}");
        let stream = nats.unless_denied(&[&about], nats.jetstream.get_stream(&name)).await?;
        let stream = stream.map_err(|e| unavailable("the stream of events", e))?;
        let pending = |info: &async_nats::jetstream::consumer::Info| info.num_pending;
        let config = pull::OrderedConfig {
            deliver_policy: match since {
                Some(start_time) => DeliverPolicy::ByStartTime { start_time },
                None => DeliverPolicy::All,
            },
            ..Default::default()
        };
        let consumer = nats.unless_denied(&[&about], stream.create_consumer(config)).await?;
        let consumer = consumer.map_err(|e| unavailable("reading events", e))?;
        let count = pending(consumer.cached_info()) as usize;
        let messages = consumer.messages().await.map_err(|e| unavailable("reading events", e))?;
        let messages = messages.filter_map(|message| async move { message.ok() });
        let parse =
            |message: async_nats::jetstream::Message| serde_json::from_slice::<Event>(&message.payload).ok();
        let events = if follow {
            messages.filter_map(move |message| async move { parse(message) }).boxed()
        } else {
            messages.take(count).filter_map(move |message| async move { parse(message) }).boxed()
        };
        Ok(EventStream { events })
    }
}

impl Stream for EventStream {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.events.as_mut().poll_next(cx)
    }
}

impl std::fmt::Debug for EventStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventStream").finish_non_exhaustive()
    }
}
