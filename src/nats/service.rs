//! The data operations as a NATS micro service, so that `nats service ls` and `info` show them.

use super::connect::Nats;
use super::subjects::Subjects;
use super::unavailable;
use crate::error::Result;
use async_nats::Message;
use async_nats::service::{Service, ServiceExt};
use futures::stream::{BoxStream, SelectAll};
use futures::{Stream, StreamExt};
use std::collections::HashMap;

/// Nodes share this group: each request goes to one of them.
const QUEUE_GROUP: &str = "api";

/// A running service.
pub(crate) struct ApiService {
    service: Service,
    requests: SelectAll<BoxStream<'static, (&'static str, Message)>>,
}

impl ApiService {
    pub(crate) async fn start(
        nats: &Nats,
        subjects: &Subjects,
        node: &str,
        verbs: &[&'static str],
    ) -> Result<ApiService> {
        let service = nats
            .client
            .service_builder()
            .description("ruvector-cluster: vectors, sharded and replicated")
            .metadata(HashMap::from([("node".to_owned(), node.to_owned())]))
            .queue_group(QUEUE_GROUP)
            .start(subjects.namespace(), env!("CARGO_PKG_VERSION"))
            .await
            .map_err(|e| unavailable("starting the service", e))?;
        let mut requests = SelectAll::new();
        for verb in verbs.iter().copied() {
            let endpoint = service.endpoint_builder().name(verb).add(subjects.api(verb)).await;
            let endpoint = endpoint.map_err(|e| unavailable("adding an endpoint", e))?;
            requests.push(endpoint.map(move |request| (verb, request.message)).boxed());
        }
        nats.flush().await?;
        Ok(ApiService { service, requests })
    }

    pub(crate) async fn next(&mut self) -> Option<(&'static str, Message)> {
        self.requests.next().await
    }

    /// Leaves the queue group, and gives what was handed over: NATS's client unsubscribes each endpoint the next time
    /// that it is read, which leaves nothing behind on another connection (see [`leave`](super::leave)). What is on its way
    /// in that moment is lost; whoever asked asks again. If the client cannot take that in, an endpoint goes on until it is dropped.
    pub(crate) async fn leave(self) -> impl Stream<Item = (&'static str, Message)> {
        let _ = self.service.stop().await;
        self.requests
    }
}
