use super::*;
use crate::model::admin::{MigrateRequest, ShardsRequest};
use crate::model::api::{CountRequest, GetRequest, SearchRequest, UpsertRequest};
use crate::model::{Consistency, ShardId};
use serde::Serialize;
use serde_json::{Value, json};

fn refused<T: DeserializeOwned + std::fmt::Debug>(body: &str, words: &[&str]) {
    let error = read::<T>(Format::Json, body.as_bytes()).unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error:?}");
    let text = error.to_string();
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} are not all in {text:?}");
}

fn packed<T: DeserializeOwned>(request: &impl Serialize) -> Result<T> {
    read(Format::MessagePack, &rmp_serde::to_vec_named(request).unwrap()).map(|request| request.value)
}

fn refused_packed<T: DeserializeOwned + std::fmt::Debug>(request: &impl Serialize, words: &[&str]) {
    let text = packed::<T>(request).unwrap_err().to_string();
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} are not all in {text:?}");
}

#[test]
fn a_misspelt_field_is_refused_with_those_that_there_are() {
    let body = r#"{"vector":[1,0],"k":3,"filtr":{"tenant":"a"}}"#;
    refused::<SearchRequest>(body, &["unknown field `filtr`", "`filter`", "`with_payload`"]);
    let request: Value = serde_json::from_str(body).unwrap();
    refused_packed::<SearchRequest>(&request, &["unknown field `filtr`", "`filter`"]);
    refused::<SearchRequest>(r#"{"vector":[1],"k":1,"Filter":{}}"#, &["unknown field `Filter`"]);
    refused::<UpsertRequest>(
        r#"{"entries":[{"id":"a","vector":[1]},{"id":"b","vector":[1],"paylod":{}}]}"#,
        &["entries[1]", "`paylod`", "`payload`"],
    );
    refused::<MigrateRequest>(r#"{"shard":1,"too":"n4"}"#, &["`too`", "`to`"]);
    refused::<ShardsRequest>(r#"{"form":1}"#, &["`form`", "`from`"]);
}

#[test]
fn fields_by_position_or_by_number_are_refused() {
    refused::<SearchRequest>("[[1,2],3]", &["an object with the fields vector, k"]);
    refused::<UpsertRequest>(r#"{"entries":[["a",[1,2]]]}"#, &["entries[0]", "an object with the fields id"]);
    refused_packed::<GetRequest>(&("a", "eventual"), &["an object with the fields id"]);
    let by_number = std::collections::BTreeMap::from([(0, "a")]);
    refused_packed::<GetRequest>(&by_number, &["a name in text"]);
    refused_packed::<CountRequest>(
        &std::collections::BTreeMap::from([("consistency", 0)]),
        &["a name in text"],
    );
    refused::<CountRequest>(r#"{"consistency":{"eventual":null}}"#, &["consistency", "a name in text"]);
    for body in ["null", "7", "\"x\"", "true"] {
        refused::<CountRequest>(body, &["an object with the fields consistency"]);
    }
}

#[test]
fn a_field_that_is_there_twice_is_refused_wherever_it_is() {
    refused::<GetRequest>(r#"{"id":"a","id":"b"}"#, &["duplicate field `id`"]);
    refused::<GetRequest>(r#"{"id":"a","after":{"1":2,"1":3}}"#, &["after", "duplicate field `1`"]);
    let filter = r#"{"vector":[1],"k":1,"filter":{"a":{"t":1,"t":2}}}"#;
    refused::<SearchRequest>(filter, &["filter.a", "duplicate field `t`"]);
}

/// serde_json's feature `raw_value` takes an object with this field for the JSON in its text.
#[test]
fn a_field_with_a_private_name_of_the_parser_changes_no_payload() {
    let name = "$serde_json::private::RawValue";
    for inner in [json!({name: "7"}), json!({name: "18446744073709551617"}), json!({"z": 1, name: "bad"})] {
        let request = json!({"entries": [{"id": "a", "vector": [1], "payload": {"x": [inner]}}]});
        refused::<UpsertRequest>(&request.to_string(), &["entries[0].payload.x[0]", name]);
        refused_packed::<UpsertRequest>(&request, &["entries[0].payload.x[0]", name]);
    }
    for kept in [json!({"x": {"$serde_json::private::Number": "7"}}), json!({name: "7"})] {
        let request = json!({"entries": [{"id": "a", "vector": [1], "payload": kept}]});
        let read = read::<UpsertRequest>(Format::Json, request.to_string().as_bytes()).unwrap();
        assert_eq!(read.value.entries[0].payload.as_ref(), kept.as_object());
        assert_eq!(packed::<UpsertRequest>(&request).unwrap(), read.value);
    }
}

#[test]
fn what_follows_a_request_is_refused() {
    refused::<CountRequest>("{} {}", &["follows"]);
    refused::<CountRequest>("{}x", &["follows"]);
    assert!(read::<CountRequest>(Format::Json, b" {} \r\n").is_ok());
    let mut body = rmp_serde::to_vec_named(&CountRequest::default()).unwrap();
    body.extend([0xc0, 0xc0]);
    let text = read::<CountRequest>(Format::MessagePack, &body).unwrap_err().to_string();
    assert!(text.contains("2 bytes follow"), "{text}");
}

#[test]
fn numbers_that_would_change_are_refused_with_their_place() {
    let upsert = |x: &str| format!(r#"{{"entries":[{{"id":"a","vector":[1],"payload":{{"n":[0,{x}]}}}}]}}"#);
    refused::<UpsertRequest>(
        &upsert("18446744073709551617"),
        &["entries[0].payload.n[1]", "18446744073709551617 cannot be held exactly"],
    );
    refused::<UpsertRequest>(&upsert("-9223372036854775809"), &["cannot be held exactly"]);
    refused::<UpsertRequest>(&upsert("1e400"), &["entries[0].payload.n[1]", "out of range"]);
    refused::<UpsertRequest>(&upsert("1e-400"), &["1e-400", "become 0"]);
    refused::<SearchRequest>(
        r#"{"vector":[1],"k":1,"filter":{"n":18446744073709551617}}"#,
        &["filter.n", "cannot be held exactly"],
    );
    for exact in ["9223372036854775809", "18446744073709551615", "-9223372036854775808", "1e20", "0.1", "-0"]
    {
        let read: Request<UpsertRequest> = read(Format::Json, upsert(exact).as_bytes()).unwrap();
        let number = &read.value.entries[0].payload.as_ref().unwrap()["n"][1];
        assert_eq!(number.to_string().parse::<f64>().unwrap(), exact.parse::<f64>().unwrap());
    }
    // The nearest f32 stands for a vector's numbers, however they are written; not for one beyond all.
    let vector = |x: &str| format!(r#"{{"entries":[{{"id":"a","vector":[{x}]}}]}}"#);
    for rounded in ["0.1", "16777216", "1e20", "1e-44", "0.12345678901234567"] {
        assert!(read::<UpsertRequest>(Format::Json, vector(rounded).as_bytes()).is_ok(), "{rounded}");
    }
    refused::<UpsertRequest>(&vector("1e39"), &["entries[0].vector[0]", "too large"]);
    refused::<UpsertRequest>(&vector("1,16777217"), &["entries[0].vector[1]", "become 16777216"]);
    refused::<GetRequest>(r#"{"id":"a","after":{"1":-1}}"#, &["after.1", "-1"]);
    refused::<GetRequest>(r#"{"id":"a","after":{"1":"7"}}"#, &["after.1", "string"]);
    refused::<GetRequest>(r#"{"id":"a","after":{"1":1.0}}"#, &["after.1", "floating point"]);
}

#[test]
fn a_vector_in_json_is_rounded_only_where_it_is_a_fraction() {
    let upsert = |x: &str| format!(r#"{{"entries":[{{"id":"a","vector":[1,{x}]}}]}}"#);
    let hidden = |x: &str| format!(r#"{{"entries":[{{"id":"a","v\u0065ctor":[1,{x}]}}]}}"#);
    let search = |x: &str| format!(r#"{{"vector":[1,{x}],"k":1}}"#);
    for (lost, word) in [
        ("16777217.0", "would become 16777216"),
        ("1.6777217e7", "would become 16777216"),
        ("-16777217.0", "would become -16777216"),
        ("9007199254740993.0", "9007199254740993.0 has more digits"),
        ("9007199254740993", "would become"),
        ("18446744073709551617", "18446744073709551617 has more digits"),
        ("123456789012345678901.0", "would become 123456790000000000000"),
        ("1e-50", "too small"),
        ("-1e-60", "too small"),
    ] {
        for body in [upsert(lost), hidden(lost)] {
            refused::<UpsertRequest>(&body, &["entries[0].vector[1]", word]);
        }
        refused::<SearchRequest>(&search(lost), &["vector[1]", word]);
    }
    let zeros = format!("0.{}1", "0".repeat(400));
    for vanished in ["1e-400", &zeros] {
        refused::<UpsertRequest>(&upsert(vanished), &["become 0"]);
        refused::<SearchRequest>(&search(vanished), &["become 0"]);
    }
    for (kept, number) in [
        ("16777216.0", 16_777_216.0),
        ("100000000000000000000", 1e20),
        ("1e20", 1e20),
        ("0.12345678901234567", 0.123_456_79),
        ("3.14159265358979323846", std::f32::consts::PI),
        ("16777217.5", 16_777_218.0),
        ("0e-999", 0.0),
        ("-0.0", 0.0),
    ] {
        let request = read::<SearchRequest>(Format::Json, search(kept).as_bytes()).unwrap();
        assert_eq!(request.value.vector, [1.0, number], "{kept}");
    }
}

#[test]
fn nan_and_infinities_in_messagepack_are_refused_and_never_null() {
    #[derive(Serialize)]
    struct Entry<P> {
        id: &'static str,
        vector: Vec<f64>,
        payload: P,
    }
    #[derive(Serialize)]
    struct Upsert<P> {
        entries: Vec<Entry<P>>,
    }
    let with = |x: f64, y: f64| Upsert {
        entries: vec![Entry {
            id: "a",
            vector: vec![1.0, y],
            payload: std::collections::BTreeMap::from([("x", vec![1.0, x])]),
        }],
    };
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        refused_packed::<UpsertRequest>(&with(bad, 0.0), &["entries[0].payload.x[1]", "only finite"]);
        refused_packed::<UpsertRequest>(&with(0.0, bad), &["entries[0].vector[1]", "only finite"]);
    }
    assert!(packed::<UpsertRequest>(&with(0.5, 0.0)).is_ok());
    #[derive(Serialize)]
    struct Search {
        vector: Vec<f32>,
        k: u32,
        filter: std::collections::BTreeMap<&'static str, f32>,
    }
    let filter = std::collections::BTreeMap::from([("x", f32::NAN)]);
    refused_packed::<SearchRequest>(
        &Search { vector: vec![1.0], k: 1, filter },
        &["filter.x", "only finite"],
    );
}

#[test]
fn bodies_of_every_type_are_read_or_refused_with_what_is_expected() {
    let json = [
        None,
        Some("application/json"),
        Some("Application/JSON; charset=UTF-8"),
        Some("application/json;x=y"),
    ];
    assert!(json.into_iter().all(|said| format(said) == Ok(Format::Json)));
    assert_eq!(format(Some(" application/x-msgpack ")), Ok(Format::MessagePack));
    for said in ["text/plain", "", "json", "application/cbor", "application/json+msgpack"] {
        let text = format(Some(said)).unwrap_err().to_string();
        assert!(text.contains("application/json or application/msgpack"), "{text}");
    }
    assert!(format(Some("application/json; charset=latin1")).unwrap_err().to_string().contains("utf-8"));
    let packed = rmp_serde::to_vec_named(&CountRequest::default()).unwrap();
    let text = read::<CountRequest>(Format::Json, &packed).unwrap_err().to_string();
    assert!(text.contains("Content-Type: application/msgpack"), "{text}");
    refused::<CountRequest>("\u{feff}{}", &["byte order mark"]);
    for format in [Format::Json, Format::MessagePack] {
        let read: Request<CountRequest> = read(format, b"").unwrap();
        assert_eq!(read.value, CountRequest::default());
    }
    refused::<GetRequest>("", &["missing field `id`"]);
}

#[test]
fn requests_read_as_before() {
    let body = json!({"vector": [1, 2.5], "k": 5, "filter": {"a": [1, {"b": null}]}, "consistency": "eventual",
        "after": {"7": 12}, "allow_partial": true});
    for request in [serde_json::from_value::<SearchRequest>(body.clone()).unwrap(), packed(&body).unwrap()] {
        let bytes = serde_json::to_vec(&body).unwrap();
        let read = read::<SearchRequest>(Format::Json, &bytes).unwrap();
        assert_eq!((&read.value, read.value.consistency), (&request, Consistency::Eventual));
        // A vector in MessagePack is one `bin`.
        assert_eq!(packed::<SearchRequest>(&request).unwrap(), request);
    }
    let read = read::<MigrateRequest>(Format::Json, br#"{"shard":3,"to":"n1","from":null}"#).unwrap().value;
    assert_eq!((read.shard, read.from), (ShardId(3), None));
}

#[test]
fn small_texts_that_take_much_memory_are_known_for_it() {
    let payload: String = vec![r#"{"":0}"#; 1_000].join(",");
    let body = format!(r#"{{"entries":[{{"id":"a","vector":[1],"payload":{{"x":[{payload}]}}}}]}}"#);
    let read: Request<UpsertRequest> = read(Format::Json, body.as_bytes()).unwrap();
    assert!(body.len() < 10_000 && read.memory > 600_000, "{} bytes, {}", body.len(), read.memory);
}

#[test]
fn nested_requests_leave_some_of_a_small_stack() {
    let json = format!(r#"{{"entries":[{{"id":"a","vector":[1],"payload":{}"#, r#"{"a":"#.repeat(100_000));
    let arrays = format!(r#"{{"vector":[1],"k":1,"filter":{{"a":{}"#, "[".repeat(100_000));
    let mut packed = vec![0x81, 0xa6, b'f', b'i', b'l', b't', b'e', b'r'];
    packed.extend([0x81, 0xa1, b'a'].repeat(100_000));
    let reads = move || {
        assert!(read::<UpsertRequest>(Format::Json, json.as_bytes()).is_err());
        assert!(read::<SearchRequest>(Format::Json, arrays.as_bytes()).is_err());
        assert!(read::<SearchRequest>(Format::MessagePack, &packed).is_err());
    };
    // Half of what threads of the runtime have.
    std::thread::Builder::new().stack_size(1 << 20).spawn(reads).unwrap().join().unwrap();
}

/// A key that is written with an escape hides a vector from the look for numbers that cannot be held, and each float of a
/// payload is looked up among what was found.
#[test]
fn the_time_of_a_request_does_not_grow_with_the_product_of_its_numbers() {
    let time = |end: &str, floats: usize| {
        let vector = (0..8_000).map(|n| format!("0.{n:04}{end}")).collect::<Vec<_>>().join(",");
        let payload = vec!["0.5"; floats].join(",");
        let body =
            format!(r#"{{"entries":[{{"id":"a","vect\u006fr":[{vector}],"payload":{{"x":[{payload}]}}}}]}}"#);
        let began = tokio::time::Instant::now();
        read::<UpsertRequest>(Format::Json, body.as_bytes()).unwrap();
        began.elapsed()
    };
    let (held, lost) = ("5", "5678901234567891");
    let (both, sum) = (time(lost, 30_000), time(lost, 1) + time(held, 30_000));
    assert!(both < sum * 4, "{both:?}, one after the other {sum:?}");
}
