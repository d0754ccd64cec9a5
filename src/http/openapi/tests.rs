use std::collections::BTreeSet;

use jsonschema::Validator;
use serde_json::{Value, json};

use super::*;
use crate::http::json::{FromFields, demands, parse};

fn document() -> Value {
    json!(describe())
}

fn schema_of<'a>(document: &'a Value, name: &str) -> &'a Value {
    &document["components"]["schemas"][name]
}

/// Checks values against one schema of the document.
fn validator(document: &Value, name: &str) -> Validator {
    let schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": format!("#/components/schemas/{name}"),
        "components": document["components"],
    });
    jsonschema::options().should_validate_formats(true).build(&schema).unwrap()
}

/// Just within and just beyond whatever is asked anywhere.
fn trials() -> Vec<Value> {
    let edges = [0, 1, 16, 30, 60, 64, 100, 128, 200, 256, 1000, 2000, 2048];
    let around = edges.into_iter().flat_map(|edge| [edge, edge + 1]);
    let lengths: Vec<usize> = around.collect();
    let numbers = [65_536, 86_400, 604_800, (1_u64 << 53) - 1];
    let mut trials: Vec<Value> = vec![
        json!(null),
        json!(true),
        json!(-1),
        json!(0.5),
        json!(2.0),
        json!({}),
        json!({ "a": true }),
        json!({ "a": 1 }),
        json!([1.5]),
        json!([-1]),
        json!(["video", "translation"]),
        json!(["film"]),
        json!([{ "prompt": "a pier" }]),
        json!([{ "prompt": "" }]),
        json!([{}]),
    ];
    trials.extend(lengths.iter().map(|length| json!("ü".repeat(*length))));
    trials.extend(lengths.iter().map(|length| json!(["x".repeat(*length)])));
    trials.extend(lengths.iter().map(|length| json!(vec!["video"; *length])));
    trials.extend(lengths.iter().map(|length| json!(vec![7; *length])));
    trials.extend(lengths.iter().map(|length| json!(vec![json!({ "prompt": "a pier" }); *length])));
    trials.extend(lengths.iter().map(|number| json!(number)));
    trials.extend(numbers.iter().flat_map(|number| [json!(number), json!(number + 1)]));
    trials.extend(
        [
            " ",
            "\n\t",
            "a\nb",
            "a\0b",
            "a\u{85}b",
            "480p",
            "4k",
            "8k",
            "16:9",
            "4:3",
            "storyboard",
            "in_progress",
            "done",
            "https://example.com/told",
            "018f2f60-7c1e-7d7c-8a3c-5a3b5a3b5a3b",
        ]
        .map(Value::from),
    );
    trials
}

/// Where the document asks for more than the reading of the field alone does.
const CHECKED_LATER: [&str; 1] = ["callback_url"];
/// Where one field asks for another, which is said in words.
const IN_WORDS: [&str; 4] =
    ["organization_id", "organizationId", "organization_role", "organizationRole"];

/// The document accepts a body if and only if the code does, whatever one of its fields holds.
fn check<T: FromFields + ToSchema>(good: Value) {
    let document = document();
    let name = T::name();
    let valid = validator(&document, &name);
    let taken = |body: &Value| parse::<T>(body.to_string().as_bytes()).is_ok();
    assert!(valid.is_valid(&good) && taken(&good), "{name}: {good}");
    let spellings = demands::<T>().spellings;
    for field in schema_of(&document, &name)["properties"].as_object().unwrap().keys() {
        let stands_for = spellings.iter().find(|(other, _)| other == field).map(|(_, name)| name);
        for trial in trials() {
            let mut body = good.clone();
            if let Some(name) = stands_for {
                body.as_object_mut().unwrap().remove(name);
            }
            body[field] = trial;
            let (described, accepted) = (valid.is_valid(&body), taken(&body));
            let in_words = IN_WORDS.contains(&field.as_str()) && body[field].is_null();
            assert!(accepted || !described || in_words, "{name} would be refused: {body}");
            let stricter = CHECKED_LATER.contains(&field.as_str()) || stands_for.is_some();
            assert!(described || !accepted || stricter, "{name} would be accepted: {body}");
        }
    }
}

#[test]
fn each_body_is_described_as_it_is_read() {
    let lease_id = "018f2f60-7c1e-7d7c-8a3c-5a3b5a3b5a3b";
    check::<AccessRequest>(json!({}));
    check::<BatchRequest>(json!({ "jobs": [{ "prompt": "a pier" }] }));
    check::<CompleteRequest>(json!({ "lease_id": lease_id }));
    check::<FailRequest>(json!({ "lease_id": lease_id, "error": "no disk" }));
    check::<FlagsRequest>(json!({ "feature_flags": {} }));
    check::<LeaseRequest>(json!({ "worker_id": "w", "kinds": ["video"] }));
    check::<LinkRequest>(json!({}));
    check::<OnboardingRequest>(json!({ "step": 1 }));
    check::<OrganizationRequest>(
        json!({ "organization_id": "org_1", "organization_role": "member" }),
    );
    check::<ProgressRequest>(json!({ "lease_id": lease_id, "progress": 5 }));
    check::<Remember>(json!({ "remember_me": true }));
    check::<ReplayRequest>(json!({}));
    check::<VideoRequest>(json!({ "prompt": "a pier" }));
}

#[test]
fn every_json_body_of_the_table_is_described_by_the_code_that_reads_it() {
    let bodies = table().into_iter().filter_map(|route| match route.body? {
        Body::Json(name) => Some(name),
        Body::Form(_) | Body::Bytes(_) => None,
    });
    // Clerk's is read by nobody before its signature is.
    let bodies: BTreeSet<_> = bodies.filter(|name| *name != "Delivery").collect();
    assert_eq!(bodies.len(), BODIES.len(), "{bodies:?}");
}

#[test]
fn a_field_is_described_under_each_of_its_spellings() {
    let document = document();
    let link = &schema_of(&document, "LinkRequest")["properties"];
    for name in ["expires_in", "expiresIn"] {
        assert_eq!((&link[name]["minimum"], &link[name]["maximum"]), (&json!(1), &json!(604_800)));
    }
    let prompt = &schema_of(&document, "VideoRequest")["properties"]["prompt"];
    assert_eq!((&prompt["minLength"], &prompt["maxLength"]), (&json!(1), &json!(2000)));
    assert!(prompt["description"].is_string());
}

#[test]
fn what_an_answer_or_a_query_may_name_is_listed() {
    let document = document();
    let job = &schema_of(&document, "JobAnswer")["properties"];
    assert_eq!(job["status"]["enum"], json!(["processing", "completed", "error"]));
    assert_eq!(job["state"]["enum"].as_array().unwrap().len(), 7);
    let required = schema_of(&document, "JobAnswer")["required"].as_array().unwrap();
    assert!(required.contains(&json!("state")) && required.contains(&json!("kind")));
    let of = |path: &str, name: &str| -> Value {
        let all = document["paths"][path]["get"]["parameters"].as_array().unwrap();
        all.iter().find(|it| it["name"] == name).unwrap().clone()
    };
    let (state, kind) = (of("/jobs", "state"), of("/jobs", "kind"));
    assert_eq!(state["schema"]["enum"], job["state"]["enum"]);
    assert_eq!(kind["schema"]["enum"], json!(["video", "translation"]));
    assert_eq!((&state["required"], &kind["required"]), (&json!(false), &json!(false)));
    assert!(state["schema"]["description"].is_string());
    let limit = &of("/jobs", "limit")["schema"];
    assert_eq!(limit["type"], "integer", "there is no null in a query");
    assert_eq!((&limit["minimum"], &limit["maximum"]), (&json!(1), &json!(200)));
    assert_eq!(of("/jobs/{id}", "id")["schema"]["format"], "uuid");
    assert_eq!(of("/admin/users/{id}", "id")["schema"].get("format"), None);
    assert_eq!(of("/events", "Last-Event-ID")["schema"]["type"], "integer");
}

#[test]
fn every_success_with_a_body_says_what_it_holds() {
    let document = document();
    for route in table() {
        let method = route.method.as_str().to_lowercase();
        let success =
            &document["paths"][route.path][&method]["responses"][route.status.to_string()];
        // The answers of tus are headers alone.
        let is_empty = route.method == Method::HEAD || route.path.starts_with("/files/tus");
        assert_eq!(success["content"].is_object(), !is_empty, "{method} {}", route.path);
    }
    for path in ["/events", "/jobs/{id}/events"] {
        let success = &document["paths"][path]["get"]["responses"]["200"];
        assert!(success["content"]["text/event-stream"].is_object(), "{path}");
    }
}
