//! How JSON bodies are read and refused.

use actix_web::{App, HttpResponse, test, web};
use serde_json::json;

use super::*;

#[derive(Debug)]
struct Order {
    prompt: String,
    duration: Option<u64>,
    quality: Option<&'static str>,
    source: Option<Uuid>,
    remember: Option<bool>,
    tags: Option<Vec<String>>,
}

impl FromFields for Order {
    fn from_fields(fields: &mut Fields) -> Self {
        fields.alias("durationSeconds", "duration");
        Self {
            prompt: fields.text("prompt", 1..=20),
            duration: fields.optional_u64("duration", 1..=60),
            quality: fields.optional_choice("quality", &["480p", "720p"]),
            source: fields.optional_uuid("source"),
            remember: fields.optional_bool("remember"),
            tags: fields.optional_texts("tags", 0..=2, 1..=3),
        }
    }
}

#[derive(Debug)]
struct Batch(Vec<Order>);

impl FromFields for Batch {
    fn from_fields(fields: &mut Fields) -> Self {
        Self(fields.objects("jobs", 1..=2))
    }
}

fn refused<T: FromFields + std::fmt::Debug>(body: Value) -> Value {
    let problem = parse::<T>(body.to_string().as_bytes()).unwrap_err();
    assert_eq!(problem.code(), Code::ValidationFailed);
    problem.body()["detail"]["fields"].clone()
}

#[core::prelude::v1::test]
fn a_good_body_is_read_and_unknown_fields_are_ignored() {
    let body = json!({"prompt": "a ü", "durationSeconds": 5.0, "quality": "720p", "new": [1],
        "source": "0190d3a0-0000-7000-8000-000000000001", "remember": true, "tags": ["x"]});
    let order: Order = parse(body.to_string().as_bytes()).unwrap();
    assert_eq!((order.prompt.as_str(), order.duration), ("a ü", Some(5)));
    assert_eq!((order.quality, order.remember), (Some("720p"), Some(true)));
    assert!(order.source.is_some());
    assert_eq!(order.tags, Some(vec!["x".to_owned()]));
}

#[core::prelude::v1::test]
fn null_is_absent() {
    let order: Order = parse(br#"{"prompt":"x","duration":null}"#).unwrap();
    assert_eq!(order.duration, None);
    assert_eq!(refused::<Order>(json!({"prompt": null})), json!({"prompt": "is required"}));
}

#[core::prelude::v1::test]
fn each_wrong_field_says_what_it_must_be() {
    let body = json!({"prompt": 5, "duration": 61, "quality": "8k", "source": "x",
        "remember": "yes", "tags": ["long"]});
    let expected = json!({
        "prompt": "must be a string",
        "duration": "must be a whole number from 1 to 60",
        "quality": "must be one of 480p, 720p",
        "source": "must be a UUID",
        "remember": "must be true or false",
        "tags": "must be a list of strings of 1 to 3 characters each",
    });
    assert_eq!(refused::<Order>(body), expected);
}

#[core::prelude::v1::test]
fn numbers_must_be_whole_and_in_range() {
    for duration in [json!(0), json!(-1), json!(1.5), json!(1e300), json!("5"), json!([5])] {
        let body = json!({"prompt": "x", "duration": duration});
        assert!(refused::<Order>(body)["duration"].is_string());
    }
}

#[core::prelude::v1::test]
fn lengths_count_characters() {
    assert!(parse::<Order>(json!({"prompt": "ü".repeat(20)}).to_string().as_bytes()).is_ok());
    for prompt in [String::new(), "ü".repeat(21)] {
        let fields = refused::<Order>(json!({"prompt": prompt}));
        assert_eq!(fields, json!({"prompt": "must be 1 to 20 characters long"}));
    }
}

#[core::prelude::v1::test]
fn a_batch_names_the_place() {
    let body = json!({"jobs": [{"prompt": "good"}, {"prompt": ""}]});
    let expected = json!({"jobs[1].prompt": "must be 1 to 20 characters long"});
    assert_eq!(refused::<Batch>(body), expected);
    assert!(refused::<Batch>(json!({"jobs": [3]}))["jobs[0]"].is_string());
    let too_few = json!({"jobs": "must be a list of 1 to 2 items"});
    assert_eq!(refused::<Batch>(json!({"jobs": []})), too_few);
    let batch: Batch = parse(br#"{"jobs":[{"prompt":"a"}]}"#).unwrap();
    assert_eq!(batch.0.len(), 1);
}

async fn send(kind: &str, body: &'static [u8], path: &str) -> (u16, String) {
    async fn needed(order: Json<Order>) -> HttpResponse {
        HttpResponse::Ok().body(order.0.prompt)
    }
    async fn optional(batch: OptionalJson<Lenient>) -> HttpResponse {
        HttpResponse::Ok().body(format!("{:?}", batch.0.0))
    }
    let app = App::new()
        .route("/needed", web::post().to(needed))
        .route("/optional", web::post().to(optional));
    let app = test::init_service(app).await;
    let mut request = test::TestRequest::post().uri(path).set_payload(body);
    if !kind.is_empty() {
        request = request.insert_header(("content-type", kind));
    }
    let response = test::call_service(&app, request.to_request()).await;
    let status = response.status().as_u16();
    (status, String::from_utf8(test::read_body(response).await.to_vec()).unwrap())
}

#[derive(Debug)]
struct Lenient(Option<u64>);

impl FromFields for Lenient {
    fn from_fields(fields: &mut Fields) -> Self {
        Self(fields.optional_u64("n", 0..=9))
    }
}

#[actix_web::test]
async fn statuses_follow_what_is_wrong() {
    let json = "application/json; charset=utf-8";
    let big: &'static [u8] = vec![b' '; 256 * 1024 + 1].leak();
    let deep: &'static [u8] = vec![b'['; 100_000].leak();
    for (kind, body, status) in [
        (json, br#"{"prompt":"x"}"# as &[u8], 200),
        ("text/plain", br#"{"prompt":"x"}"#, 415),
        ("", br#"{"prompt":"x"}"#, 415),
        ("", b"", 400),
        (json, b"{", 400),
        (json, b"\xff\xfe", 400),
        (json, deep, 400),
        (json, b"[]", 422),
        (json, b"{}", 422),
        (json, big, 413),
    ] {
        let (got, answer) = send(kind, body, "/needed").await;
        assert_eq!(got, status, "{kind} {:?}: {answer}", &body[..body.len().min(20)]);
        assert!(!answer.contains("expected"), "serde's words: {answer}");
    }
}

#[actix_web::test]
async fn an_optional_body_may_be_left_out() {
    assert_eq!(send("", b"", "/optional").await, (200, "None".to_owned()));
    assert_eq!(send("application/json", b"", "/optional").await.0, 200);
    assert_eq!(send("application/json", b"{\"n\":3}", "/optional").await.1, "Some(3)");
    assert_eq!(send("text/plain", b"{\"n\":3}", "/optional").await.0, 415);
    assert_eq!(send("application/json", b"{\"n\":30}", "/optional").await.0, 422);
}
