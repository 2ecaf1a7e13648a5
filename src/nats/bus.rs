//! Core NATS: requests with typed replies, and answers.

use super::connect::Nats;
use super::room::{IN_MEMORY, Room};
use super::unavailable;
use crate::error::{Error, Result, WireError, shortened};
use crate::model::wire::{self, Reply};
use crate::mutant::mutant;
use async_nats::HeaderMap;
pub(crate) use async_nats::{Message, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use serde::{Serialize, de::DeserializeOwned};
use std::time::Duration;

pub(crate) const CONTENT_TYPE: &str = "Content-Type";
pub(crate) const JSON: &str = "application/json";
pub(crate) const MSGPACK: &str = "application/msgpack";
/// Header: who sent it.
pub(crate) const NODE: &str = "Ruvector-Node";
/// Header: XXH3-64 of the body.
pub(crate) const CHECKSUM: &str = "Ruvector-Checksum";
/// Answers beyond are waited for until they are written: NATS's client queues as many as it likes of any size.
const LARGE: usize = 64 * 1024;
const ERROR: &str = "Nats-Service-Error";
const ERROR_CODE: &str = "Nats-Service-Error-Code";

/// Sends as somebody on one connection.
#[derive(Debug, Clone)]
pub(crate) struct Bus {
    pub(crate) nats: Nats,
    sender: String,
}

/// What became of a request, where *no responders* matters by itself.
#[derive(Debug)]
pub(crate) enum Asked<T> {
    Answer(T),
    NoResponders,
    /// In time.
    NoAnswer(Error),
}

impl Bus {
    /// `sender`: the node's id, or what else sends.
    pub(crate) fn new(nats: &Nats, sender: &str) -> Self {
        Bus { nats: nats.clone(), sender: sender.to_owned() }
    }

    pub(crate) fn headers(&self, content_type: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, content_type);
        headers.insert(NODE, self.sender.as_str());
        headers
    }

    /// Publishes JSON, best effort: while NATS is away nothing is queued, so nothing stale is sent later.
    pub(crate) async fn publish_json<T: Serialize>(&self, subject: String, value: &T) -> Result<()> {
        if !self.nats.is_connected() {
            return Err(Error::Unavailable("not connected to NATS".into()));
        }
        let body = serde_json::to_vec(value).map_err(|e| Error::Internal(format!("encoding failed: {e}")))?;
        self.send(subject, None, self.headers(JSON), body.into()).await
    }

    /// Publishes MessagePack with a checksum.
    pub(crate) async fn publish_checked<T: Serialize>(&self, subject: String, value: &T) -> Result<usize> {
        let mut body = wire::encode(value)?;
        let mut headers = self.headers(MSGPACK);
        headers.insert(CHECKSUM, wire::checksum(&body).as_str());
        if mutant("corrupt-chunks") {
            corrupt(&mut body);
        }
        let bytes = body.len();
        self.send(subject, None, headers, body.into()).await?;
        Ok(bytes)
    }

    async fn send(
        &self,
        subject: String,
        reply: Option<String>,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<()> {
        // While disconnected the client queues some messages and then blocks: bound it.
        let client = &self.nats.client;
        let sent = async {
            match reply {
                Some(reply) => client.publish_with_reply_and_headers(subject, reply, headers, body).await,
                None => client.publish_with_headers(subject, headers, body).await,
            }
        };
        match tokio::time::timeout(Duration::from_secs(2), sent).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(unavailable("publishing failed", e)),
            Err(_) => Err(Error::Unavailable("not connected to NATS: publishing took too long".into())),
        }
    }

    /// MessagePack request, MessagePack reply.
    pub(crate) async fn ask<Q: Serialize, A: DeserializeOwned>(
        &self,
        subject: String,
        request: &Q,
        timeout: Duration,
    ) -> Asked<Result<A>> {
        self.ask_within(subject, request, timeout, &Room::default()).await
    }

    /// Like [`ask`](Self::ask); the answer must find room before it is read.
    pub(crate) async fn ask_within<Q: Serialize, A: DeserializeOwned>(
        &self,
        subject: String,
        request: &Q,
        timeout: Duration,
        room: &Room,
    ) -> Asked<Result<A>> {
        let body = match wire::encode(request) {
            Ok(body) => body,
            Err(error) => return Asked::Answer(Err(error)),
        };
        match self.request_raw(subject, self.headers(MSGPACK), body.into(), timeout).await {
            Asked::Answer(message) => {
                let answer = room.grow(message.payload.len() * IN_MEMORY);
                let answer = answer.and_then(|()| wire::decode::<Reply<A>>(&message.payload));
                Asked::Answer(answer.and_then(Into::into))
            }
            Asked::NoResponders => Asked::NoResponders,
            Asked::NoAnswer(error) => Asked::NoAnswer(error),
        }
    }

    /// Asks everybody who listens, and takes all good answers that come within `time`.
    pub(crate) async fn ask_everybody<Q: Serialize, A: DeserializeOwned>(
        &self,
        subject: String,
        request: &Q,
        time: Duration,
    ) -> Result<Vec<A>> {
        let (client, body) = (&self.nats.client, wire::encode(request)?);
        let inbox = client.new_inbox();
        let answers = client.subscribe(inbox.clone()).await.map_err(|e| unavailable("subscribing", e))?;
        self.send(subject, Some(inbox), self.headers(MSGPACK), body.into()).await?;
        let mut answers = std::pin::pin!(answers.take_until(tokio::time::sleep(time)));
        let mut good = Vec::new();
        while let Some(message) = answers.next().await {
            let answer = wire::decode::<Reply<A>>(&message.payload).and_then(Into::into);
            good.extend(answer.ok());
        }
        Ok(good)
    }

    /// Like [`ask`](Self::ask), with every failure as an error.
    pub(crate) async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        subject: String,
        request: &Q,
        timeout: Duration,
    ) -> Result<A> {
        match self.ask(subject.clone(), request, timeout).await {
            Asked::Answer(answer) => answer,
            Asked::NoResponders => Err(Error::Unavailable(format!("nobody listens on {subject}"))),
            Asked::NoAnswer(error) => Err(error),
        }
    }

    /// JSON request, JSON reply: `{"error":{…}}` or the value itself.
    pub(crate) async fn ask_json<Q: Serialize, A: DeserializeOwned>(
        &self,
        subject: String,
        request: &Q,
        timeout: Duration,
    ) -> Asked<Result<A>> {
        let body = match serde_json::to_vec(request) {
            Ok(body) => body,
            Err(e) => return Asked::Answer(Err(Error::Internal(format!("encoding failed: {e}")))),
        };
        match self.request_raw(subject.clone(), self.headers(JSON), body.into(), timeout).await {
            Asked::Answer(message) => Asked::Answer(match serde_json::from_slice(&message.payload) {
                Ok(Failure { error }) => Err(error.into()),
                Err(_) => serde_json::from_slice(&message.payload)
                    .map_err(|e| Error::Invalid(format!("the reply on {subject} does not parse: {e}"))),
            }),
            Asked::NoResponders => Asked::NoResponders,
            Asked::NoAnswer(error) => Asked::NoAnswer(error),
        }
    }

    /// The bare request, bounded in time also while disconnected.
    pub(crate) async fn request_raw(
        &self,
        subject: String,
        headers: HeaderMap,
        body: Bytes,
        timeout: Duration,
    ) -> Asked<Message> {
        let request = async_nats::Request::new().payload(body).headers(headers).timeout(Some(timeout));
        let asked = self.nats.client.send_request(subject.clone(), request);
        let asked = tokio::time::timeout(timeout + Duration::from_millis(50), asked);
        let quoted = format!("\"{subject}\"");
        let asked = match self.nats.unless_denied(&[&quoted], asked).await {
            Ok(asked) => asked,
            Err(denied) => return Asked::NoAnswer(denied),
        };
        match asked {
            Ok(Ok(message)) => Asked::Answer(message),
            Ok(Err(error)) => match error.kind() {
                async_nats::RequestErrorKind::NoResponders => Asked::NoResponders,
                async_nats::RequestErrorKind::MaxPayloadExceeded => Asked::NoAnswer(Error::Invalid(format!(
                    "the request on {subject} is larger than NATS's max_payload"
                ))),
                _ => Asked::NoAnswer(no_answer(&subject, timeout)),
            },
            Err(_) => Asked::NoAnswer(no_answer(&subject, timeout)),
        }
    }

    /// Answers a request in MessagePack. Requests without reply subject are not answered.
    pub(crate) async fn answer<A: Serialize>(&self, request: &Message, result: Result<A>) {
        let Some(reply) = request.reply.clone() else { return };
        let headers = self.reply_headers(MSGPACK, result.as_ref().err());
        let body = wire::encode(&Reply::from(result)).unwrap_or_default();
        self.deliver(reply.to_string(), headers, body, MSGPACK).await;
    }

    /// Answers a request in JSON.
    pub(crate) async fn answer_json<A: Serialize>(&self, request: &Message, result: Result<A>) {
        let Some(reply) = request.reply.clone() else { return };
        let headers = self.reply_headers(JSON, result.as_ref().err());
        let body = match &result {
            Ok(value) => serde_json::to_vec(value),
            Err(error) => serde_json::to_vec(&Failure { error: error.into() }),
        };
        self.deliver(reply.to_string(), headers, body.unwrap_or_default(), JSON).await;
    }

    /// Answers a request in MessagePack without an envelope: the value, or `{"error":{…}}`.
    pub(crate) async fn answer_plain<A: Serialize>(&self, request: &Message, result: Result<A>) {
        let Some(reply) = request.reply.clone() else { return };
        let headers = self.reply_headers(MSGPACK, result.as_ref().err());
        let body = match &result {
            Ok(value) => wire::encode(value),
            Err(error) => wire::encode(&Failure { error: error.into() }),
        };
        self.deliver(reply.to_string(), headers, body.unwrap_or_default(), MSGPACK).await;
    }

    fn reply_headers(&self, content_type: &str, error: Option<&Error>) -> HeaderMap {
        let mut headers = self.headers(content_type);
        if let Some(error) = error {
            headers.insert(ERROR_CODE, error.status().to_string().as_str());
            // A header value is one line.
            headers.insert(ERROR, shortened(error.to_string()).replace(['\r', '\n'], " ").as_str());
        }
        headers
    }

    async fn deliver(&self, reply: String, headers: HeaderMap, body: Vec<u8>, content_type: &str) {
        if body.len() > self.nats.max_body() {
            let error = too_large(body.len(), self.nats.max_body());
            let headers = self.reply_headers(content_type, Some(&error));
            let short = if content_type == JSON {
                serde_json::to_vec(&Failure { error: (&error).into() }).unwrap_or_default()
            } else {
                wire::encode(&Reply::<()>::Error((&error).into())).unwrap_or_default()
            };
            let _ = self.send(reply, None, headers, short.into()).await;
            return;
        }
        let large = body.len() > LARGE;
        // Whoever asked sees a time-out if this fails, and asks again.
        let sent = self.send(reply, None, headers, body.into()).await;
        if large && sent.is_ok() {
            // Until it is written it is in memory, and counts: whoever answers holds the room for it.
            let _ = tokio::time::timeout(Duration::from_secs(2), self.nats.client.flush()).await;
        }
    }
}

/// How to ask for less, said wherever an answer turns out to be too large.
pub(crate) fn too_large(bytes: usize, limit: usize) -> Error {
    Error::TooLarge(format!(
        "the answer has {bytes} bytes or more, {limit} fit into a message (NATS's max_payload): raise that, or ask for less; \
         of vectors with with_payload: false, with_vector: false or a smaller k"
    ))
}

/// Damages some chunks within a long text, so that they still parse.
fn corrupt(body: &mut [u8]) {
    use std::sync::atomic::{AtomicU64, Ordering};
    static CHUNKS: AtomicU64 = AtomicU64::new(0);
    let text = body.windows(64).position(|bytes| bytes.iter().all(|byte| *byte == b'x'));
    if let Some(at) = text
        && CHUNKS.fetch_add(1, Ordering::Relaxed).is_multiple_of(4)
    {
        body[at + 32] = b'?';
    }
}

fn no_answer(subject: &str, timeout: Duration) -> Error {
    Error::Unavailable(format!("no answer on {subject} within {timeout:?}"))
}

/// `{"error":{…}}`.
#[derive(Debug, Serialize, serde::Deserialize)]
pub(crate) struct Failure {
    pub(crate) error: WireError,
}

/// Who sent a message, for counting what does not parse.
pub(crate) fn sender(message: &Message) -> &str {
    message.headers.as_ref().and_then(|h| h.get(NODE)).map_or("?", |v| v.as_str())
}

/// What the message says that it is. Names of headers differ by case in NATS; a client that spells this one
/// as HTTP/2 does means the same.
pub(crate) fn content_type(message: &Message) -> Option<&str> {
    let mut headers = message.headers.as_ref()?.iter();
    let (_, values) = headers.find(|(name, _)| {
        let name: &str = name.as_ref();
        name.eq_ignore_ascii_case(CONTENT_TYPE)
    })?;
    values.first().map(async_nats::HeaderValue::as_str)
}

/// Checks the body against its checksum header.
///
/// # Errors
/// `Corrupt` when it is missing or differs.
pub(crate) fn verify_checksum(headers: Option<&HeaderMap>, body: &[u8]) -> Result<()> {
    match headers.and_then(|h| h.get(CHECKSUM)) {
        Some(said) if said.as_str() == wire::checksum(body) => Ok(()),
        Some(_) => Err(Error::Corrupt("the checksum does not match".into())),
        None => Err(Error::Corrupt("the checksum is missing".into())),
    }
}
