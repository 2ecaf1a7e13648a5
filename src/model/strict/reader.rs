//! A deserializer around another one, which looks at everything that passes.
//!
//! serde's derive takes fields by position from an array, by number from a map of MessagePack, and ignores
//! those that it does not know; serde_json makes `null` of a NaN. None of that can be switched off where the
//! same types also travel between nodes, so it is noticed on the way.

use crate::model::number::would_become;
use serde::de::value::StringDeserializer;
use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};
use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::fmt;

/// A map with one field takes a whole node of the tree that it is held in.
const MAP_BYTES: usize = 640;
/// One value of any type.
const VALUE_BYTES: usize = 32;
/// A text beside its bytes.
const TEXT_BYTES: usize = 32;

/// What is known while a request is read.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// Where the reader stands; after an error, where that is.
    place: Vec<Step>,
    /// About the memory that has been taken.
    pub(super) memory: usize,
    /// Floats that stand for numbers of another value, by their bits: see `numbers`. There may be as many as a request has
    /// room for, and each float of a payload is looked up.
    changed: HashMap<u64, String>,
}

#[derive(Debug)]
enum Step {
    Field(String),
    Item(usize),
}

impl Reading {
    pub(super) fn new(changed: Vec<(f64, String)>) -> Self {
        let changed = changed.into_iter().map(|(float, text)| (float.to_bits(), text)).collect();
        Reading { changed, ..Reading::default() }
    }

    /// The error with the place before it: `entries[3].payload.x: …`.
    pub(super) fn with_place(&self, error: impl fmt::Display) -> String {
        let mut place = String::new();
        for step in &self.place {
            match step {
                Step::Field(name) if place.is_empty() => place.push_str(name),
                Step::Field(name) => place.extend([".", name]),
                Step::Item(index) => place.push_str(&format!("[{index}]")),
            }
        }
        if place.is_empty() { error.to_string() } else { format!("{place}: {error}") }
    }
}

type Shared<'a> = &'a RefCell<Reading>;

pub(super) struct Strict<'a, D> {
    input: D,
    reading: Shared<'a>,
}

impl<'a, D> Strict<'a, D> {
    pub(super) fn new(input: D, reading: Shared<'a>) -> Self {
        Strict { input, reading }
    }
}

macro_rules! pass {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
            self.input.$method(Look { visitor, fields: None, kind: Kind::Typed, reading: self.reading })
        }
    )*};
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Strict<'_, D> {
    type Error = D::Error;

    pass! {
        deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_i128
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_u128
        deserialize_f32 deserialize_f64 deserialize_char deserialize_str deserialize_string deserialize_bytes
        deserialize_byte_buf deserialize_option deserialize_unit deserialize_seq deserialize_map
        deserialize_identifier
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.reading.borrow_mut().memory += VALUE_BYTES;
        self.input.deserialize_any(Look { visitor, fields: None, kind: Kind::Any, reading: self.reading })
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        // No field is ignored, so nothing asks for this; whatever does gets the value.
        self.deserialize_any(visitor)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        let look = Look { visitor, fields: None, kind: Kind::Typed, reading: self.reading };
        self.input.deserialize_unit_struct(name, look)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        let look = Look { visitor, fields: None, kind: Kind::Typed, reading: self.reading };
        self.input.deserialize_newtype_struct(name, look)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, D::Error> {
        self.input
            .deserialize_tuple(len, Look { visitor, fields: None, kind: Kind::Typed, reading: self.reading })
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        let look = Look { visitor, fields: None, kind: Kind::Typed, reading: self.reading };
        self.input.deserialize_tuple_struct(name, len, look)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        let look = Look { visitor, fields: Some(fields), kind: Kind::Typed, reading: self.reading };
        self.input.deserialize_struct(name, fields, look)
    }

    /// Choices are words in requests; never a number, nor a map.
    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        let word = self.input.deserialize_str(Word)?;
        visitor.visit_enum(IntoDeserializer::<D::Error>::into_deserializer(word))
    }

    fn is_human_readable(&self) -> bool {
        self.input.is_human_readable()
    }
}

/// What a number is for.
#[derive(Clone, Copy)]
enum Kind {
    /// Payloads and filters: whatever comes is kept as it is.
    Any,
    /// What the type says.
    Typed,
}

/// Between the input and whoever takes the value.
struct Look<'a, V> {
    visitor: V,
    /// Those of the struct that is read, if one is.
    fields: Option<&'static [&'static str]>,
    kind: Kind,
    reading: Shared<'a>,
}

macro_rules! visit {
    ($($method:ident: $type:ty)*) => {$(
        fn $method<E: Error>(self, value: $type) -> Result<V::Value, E> {
            self.visitor.$method(value)
        }
    )*};
}

impl<V> Look<'_, V> {
    fn text(&self, length: usize) {
        self.reading.borrow_mut().memory += length + TEXT_BYTES;
    }
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Look<'_, V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.fields {
            Some([]) => f.write_str("an object without fields"),
            Some(fields) => write!(f, "an object with the fields {}", fields.join(", ")),
            None => self.visitor.expecting(f),
        }
    }

    visit! {
        visit_bool: bool visit_i8: i8 visit_i16: i16 visit_i64: i64 visit_i128: i128
        visit_u8: u8 visit_u16: u16 visit_u64: u64 visit_u128: u128 visit_char: char
        visit_bytes: &[u8] visit_borrowed_bytes: &'de [u8] visit_byte_buf: Vec<u8>
    }

    fn visit_i32<E: Error>(self, value: i32) -> Result<V::Value, E> {
        self.visit_i64(value.into())
    }

    fn visit_u32<E: Error>(self, value: u32) -> Result<V::Value, E> {
        self.visit_u64(value.into())
    }

    fn visit_f32<E: Error>(self, value: f32) -> Result<V::Value, E> {
        if value.is_finite() { self.visitor.visit_f32(value) } else { Err(not_finite(value)) }
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<V::Value, E> {
        if !value.is_finite() {
            return Err(not_finite(value));
        }
        let reading = self.reading.borrow();
        if let Some(text) = reading.changed.get(&value.to_bits()) {
            let whole = value.fract() == 0.0;
            match self.kind {
                Kind::Any => {
                    // A large one has all its digits only so.
                    let held = if whole { format!("{value:.0}") } else { value.to_string() };
                    return Err(E::custom(format!(
                        "{text} cannot be held exactly, it would become {held}: send that, or a text"
                    )));
                }
                // Fields of a request that are floats are those of vectors.
                Kind::Typed if whole => return Err(E::custom(would_become(text, value as f32))),
                Kind::Typed => {}
            }
        }
        drop(reading);
        self.visitor.visit_f64(value)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<V::Value, E> {
        self.text(value.len());
        self.visitor.visit_str(value)
    }

    fn visit_borrowed_str<E: Error>(self, value: &'de str) -> Result<V::Value, E> {
        self.text(value.len());
        self.visitor.visit_borrowed_str(value)
    }

    fn visit_string<E: Error>(self, value: String) -> Result<V::Value, E> {
        self.text(value.len());
        self.visitor.visit_string(value)
    }

    fn visit_none<E: Error>(self) -> Result<V::Value, E> {
        self.visitor.visit_none()
    }

    fn visit_unit<E: Error>(self) -> Result<V::Value, E> {
        self.visitor.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, input: D) -> Result<V::Value, D::Error> {
        self.visitor.visit_some(Strict::new(input, self.reading))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, input: D) -> Result<V::Value, D::Error> {
        self.visitor.visit_newtype_struct(Strict::new(input, self.reading))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<V::Value, A::Error> {
        if self.fields.is_some() {
            return Err(A::Error::invalid_type(serde::de::Unexpected::Seq, &self));
        }
        self.reading.borrow_mut().place.push(Step::Item(0));
        let value = self.visitor.visit_seq(Items { items, next: 0, reading: self.reading })?;
        self.reading.borrow_mut().place.pop();
        Ok(value)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<V::Value, A::Error> {
        let Look { visitor, fields, reading, .. } = self;
        visitor.visit_map(Fields { map, fields, seen: BTreeSet::new(), reading })
    }

    fn visit_enum<A: EnumAccess<'de>>(self, _: A) -> Result<V::Value, A::Error> {
        Err(A::Error::custom("no choice is written so"))
    }
}

fn not_finite<E: Error>(value: impl fmt::Display) -> E {
    E::custom(format!("{value} is no number that can be stored, only finite ones are"))
}

struct Items<'a, A> {
    items: A,
    next: usize,
    reading: Shared<'a>,
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Items<'_, A> {
    type Error = A::Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, A::Error> {
        if let Some(Step::Item(index)) = self.reading.borrow_mut().place.last_mut() {
            *index = self.next;
        }
        self.next += 1;
        self.items.next_element_seed(Inside { seed, reading: self.reading })
    }

    fn size_hint(&self) -> Option<usize> {
        self.items.size_hint()
    }
}

struct Fields<'a, A> {
    map: A,
    fields: Option<&'static [&'static str]>,
    seen: BTreeSet<String>,
    reading: Shared<'a>,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Fields<'_, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        let Some(name) = self.map.next_key_seed(Word)? else { return Ok(None) };
        if let Some([]) = self.fields {
            return Err(A::Error::custom(format!("unknown field `{name}`, this request has no fields")));
        }
        if let Some(fields) = self.fields
            && !fields.contains(&name.as_str())
        {
            return Err(A::Error::unknown_field(&name, fields));
        }
        if self.seen.contains(&name) {
            return Err(A::Error::custom(format!("duplicate field `{name}`")));
        }
        let node = if self.seen.is_empty() && self.fields.is_none() { MAP_BYTES } else { 0 };
        self.reading.borrow_mut().memory += node + name.len() + TEXT_BYTES;
        self.reading.borrow_mut().place.push(Step::Field(name.clone()));
        self.seen.insert(name.clone());
        let name: StringDeserializer<A::Error> = name.into_deserializer();
        seed.deserialize(name).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, A::Error> {
        let value = self.map.next_value_seed(Inside { seed, reading: self.reading })?;
        self.reading.borrow_mut().place.pop();
        Ok(value)
    }

    fn size_hint(&self) -> Option<usize> {
        self.map.size_hint()
    }
}

/// What lies within is read as strictly.
struct Inside<'a, T> {
    seed: T,
    reading: Shared<'a>,
}

impl<'de, T: DeserializeSeed<'de>> DeserializeSeed<'de> for Inside<'_, T> {
    type Value = T::Value;

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<T::Value, D::Error> {
        self.seed.deserialize(Strict::new(input, self.reading))
    }
}

/// The name of a field, or of a choice: text and nothing else.
struct Word;

impl<'de> DeserializeSeed<'de> for Word {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<String, D::Error> {
        input.deserialize_str(self)
    }
}

impl Visitor<'_> for Word {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name in text")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<String, E> {
        Ok(name.to_owned())
    }

    fn visit_string<E: Error>(self, name: String) -> Result<String, E> {
        Ok(name)
    }
}
