//! The form of errors and the headers their statuses owe.

use super::*;

const ALL: &[Code] = &[
    Code::MalformedRequest,
    Code::InvalidJson,
    Code::MissingBody,
    Code::MultipartInvalid,
    Code::LinkMalformed,
    Code::WebhookInvalid,
    Code::Unauthenticated,
    Code::TokenInvalid,
    Code::TokenExpired,
    Code::SessionEnded,
    Code::Forbidden,
    Code::SessionPending,
    Code::RoleRequired,
    Code::PermissionRequired,
    Code::PremiumRequired,
    Code::OnboardingRequired,
    Code::InvalidOrigin,
    Code::LinkSignatureInvalid,
    Code::NotFound,
    Code::MethodNotAllowed,
    Code::RequestTimeout,
    Code::Conflict,
    Code::JobNotCompleted,
    Code::LeaseLost,
    Code::LinkExpired,
    Code::PreconditionFailed,
    Code::PayloadTooLarge,
    Code::UnsupportedMediaType,
    Code::RangeNotSatisfiable,
    Code::ValidationFailed,
    Code::IdempotencyKeyReused,
    Code::RateLimited,
    Code::InternalError,
    Code::LogUnavailable,
    Code::StorageUnavailable,
    Code::Overloaded,
    Code::NotReady,
    Code::NotCaughtUp,
    Code::KeysUnavailable,
];

fn header<'a>(response: &'a HttpResponse, name: &str) -> Option<&'a str> {
    response.headers().get(name).map(|value| value.to_str().unwrap())
}

#[test]
fn an_error_has_the_contracts_form() {
    let problem = Problem::new(Code::JobNotCompleted).with_detail(json!({"state": "queued"}));
    let expected = json!({"success": false, "error": "The job is not completed",
        "message": "The job is not completed", "code": "job_not_completed",
        "detail": {"state": "queued"}});
    assert_eq!(problem.body(), expected);
    assert_eq!(problem.status_code(), 409);
}

#[test]
fn an_expired_token_says_so_twice() {
    let problem = Problem::token_expired(1_000, 1_060);
    let body = problem.body();
    for place in [&body, &body["detail"]] {
        assert_eq!(place["requires_refresh"], true);
        assert_eq!(place["expired_at"], 1_000);
        assert_eq!(place["current_time"], 1_060);
        assert_eq!(place["expired_seconds_ago"], 60);
    }
    assert_eq!(body["error"], "Token has expired");
    assert_eq!(body["code"], "token_expired");
}

#[test]
fn the_cause_is_ours_alone() {
    let cause = std::io::Error::other("/secret/path is full");
    let problem = Problem::new(Code::InternalError).caused_by(cause);
    assert_eq!(problem.cause().as_deref(), Some("/secret/path is full"));
    assert!(!problem.body().to_string().contains("secret"));
}

#[test]
fn statuses_bring_the_headers_they_owe() {
    for code in ALL {
        let response = Problem::new(*code).error_response();
        let challenge = header(&response, "www-authenticate");
        assert_eq!(challenge.is_some_and(|it| it.starts_with("Bearer ")), {
            response.status() == 401
        });
        assert_eq!(header(&response, "retry-after").is_some(), response.status() == 503);
        assert_eq!(header(&response, "content-type"), Some("application/json"));
    }
    let no_token = Problem::new(Code::Unauthenticated).error_response();
    assert_eq!(header(&no_token, "www-authenticate"), Some("Bearer realm=\"t2m\""));
    let wrong = Problem::method_not_allowed("GET, HEAD").error_response();
    assert_eq!(header(&wrong, "allow"), Some("GET, HEAD"));
    let later = Problem::new(Code::Overloaded).retry_after(7).error_response();
    assert_eq!(header(&later, "retry-after"), Some("7"));
}

#[test]
fn names_are_unique_and_in_snake_case() {
    let names: std::collections::HashSet<_> = ALL.iter().map(|it| it.name()).collect();
    assert_eq!(names.len(), ALL.len());
    assert!(names.iter().all(|it| it.bytes().all(|b| b == b'_' || b.is_ascii_lowercase())));
}

#[test]
fn refused_fields_are_named_in_the_sentence_too() {
    let body = Problem::field("prompt", "must be a string").body();
    assert_eq!(body["detail"]["fields"]["prompt"], "must be a string");
    assert_eq!(body["error"], "Some fields are not valid: prompt must be a string");
}
