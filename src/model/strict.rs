//! Reads requests of clients, and refuses whatever a reader could take for something else.
//!
//! Messages between nodes ignore unknown fields, since versions live side by side. A client's request is
//! refused for one: a misspelt `filter` must not answer unfiltered. So are fields by position instead of by
//! name, a field that is there twice, anything after the request, numbers that cannot be held as they are,
//! and bodies of an unknown type. Keeps: what is accepted says what its sender has written, and every refusal
//! says where, and what was expected.

mod numbers;
mod reader;

use crate::error::{Error, Result};
use reader::{Reading, Strict};
use serde::de::DeserializeOwned;
use std::cell::RefCell;

/// How a body is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// `application/json`, also when nothing is said.
    Json,
    /// `application/msgpack`.
    MessagePack,
}

/// What a `Content-Type` says; `None`: there is none.
///
/// # Errors
/// [`Error::Invalid`] for a type or a character set that is not read here.
pub(crate) fn format(content_type: Option<&str>) -> Result<Format> {
    let Some(said) = content_type else { return Ok(Format::Json) };
    let mut parts = said.split(';').map(str::trim);
    let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
    let format = match kind.as_str() {
        "application/json" => Format::Json,
        "application/msgpack" | "application/x-msgpack" | "application/vnd.msgpack" => Format::MessagePack,
        _ => {
            return Err(Error::Invalid(format!(
                "Content-Type {said:?} is not read here: use application/json or application/msgpack"
            )));
        }
    };
    for part in parts {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        let value = value.trim().trim_matches('"').to_ascii_lowercase();
        if name.trim().eq_ignore_ascii_case("charset") && !matches!(value.as_str(), "utf-8" | "utf8") {
            return Err(Error::Invalid(format!("Content-Type {said:?} names a character set: use utf-8")));
        }
    }
    Ok(format)
}

/// A request as it was read.
#[derive(Debug, PartialEq)]
pub(crate) struct Request<T> {
    /// What is asked for.
    pub(crate) value: T,
    /// About how many bytes of memory it takes: small things in JSON can be large here.
    pub(crate) memory: usize,
}

/// Reads one request. An empty body has no fields.
///
/// # Errors
/// [`Error::Invalid`] that says what is wrong, and where.
pub(crate) fn read<T: DeserializeOwned>(format: Format, body: &[u8]) -> Result<Request<T>> {
    match format {
        _ if body.is_empty() => json(b"{}"),
        Format::Json => json(body),
        Format::MessagePack => message_pack(body),
    }
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<Request<T>> {
    if body.starts_with(b"\xef\xbb\xbf") || body.starts_with(b"\xff\xfe") || body.starts_with(b"\xfe\xff") {
        return Err(wrong("it begins with a byte order mark: send UTF-8 without one"));
    }
    let reading = RefCell::new(Reading::new(numbers::changed(body)?));
    let mut input = serde_json::Deserializer::from_slice(body);
    let value = T::deserialize(Strict::new(&mut input, &reading)).map_err(|error| {
        // What begins like a map of MessagePack begins no JSON.
        if matches!(body.first(), Some(0x80..=0x8f | 0xde | 0xdf)) {
            return wrong(
                "it is no JSON: for MessagePack, send the header Content-Type: application/msgpack",
            );
        }
        wrong(reading.borrow().with_place(error))
    })?;
    input.end().map_err(|error| wrong(format!("something follows the request: {error}")))?;
    Ok(Request { value, memory: reading.into_inner().memory + body.len() })
}

fn message_pack<T: DeserializeOwned>(body: &[u8]) -> Result<Request<T>> {
    let reading = RefCell::new(Reading::default());
    let mut input = rmp_serde::Deserializer::new(std::io::Cursor::new(body));
    input.set_max_depth(super::wire::MAX_DEPTH);
    let value = T::deserialize(Strict::new(&mut input, &reading))
        .map_err(|error| wrong(reading.borrow().with_place(error)))?;
    match body.len() as u64 - input.position() {
        0 => Ok(Request { value, memory: reading.into_inner().memory + body.len() }),
        rest => Err(wrong(format!("{rest} bytes follow the request"))),
    }
}

fn wrong(what: impl std::fmt::Display) -> Error {
    Error::Invalid(format!("the request does not parse: {what}"))
}

#[cfg(test)]
mod tests;
