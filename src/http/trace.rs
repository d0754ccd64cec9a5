//! What a request leaves behind: its span, which everything done for it belongs to, and its counts.

use std::time::Duration;

use actix_web::dev::ServiceRequest;
use actix_web::http::header::HeaderMap;
use actix_web::http::{Method, StatusCode};
use metrics::{counter, histogram};
use opentelemetry::propagation::Extractor;
use opentelemetry::trace::TraceContextExt;
use tracing::Span;
use tracing::field::Empty;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::routes::without_prefix;
use crate::telemetry;

/// The span of a request, within the trace that its `traceparent` names (W3C Trace Context).
pub fn span(request: &ServiceRequest, request_id: &str) -> Span {
    let span = tracing::info_span!(
        "request",
        otel.kind = "server",
        otel.status_code = Empty,
        http.request.method = %request.method(),
        http.route = Empty,
        http.response.status_code = Empty,
        request_id,
    );
    if request.headers().contains_key("traceparent") {
        let parent = opentelemetry::global::get_text_map_propagator(|propagator| {
            propagator.extract(&Headers(request.headers()))
        });
        // Without a collector there is no trace to belong to.
        let _ = span.set_parent(parent);
    }
    span
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(|name| name.as_str()).collect()
    }
}

/// Says what became of a request; `route` is its pattern. The span is named, and fails, as
/// OpenTelemetry's conventions for HTTP servers have it.
pub fn answered(
    span: &Span,
    method: &Method,
    route: Option<&str>,
    status: StatusCode,
    took: Duration,
) {
    let route = route.unwrap_or("unmatched");
    let below = without_prefix(route).unwrap_or(route);
    span.record("http.route", route);
    span.record("http.response.status_code", status.as_u16());
    let (method, below) = (known(method), below.to_owned());
    // Its field `otel.name` counts only before the trace has begun.
    span.context().span().update_name(format!("{method} {route}"));
    if status.is_server_error() {
        span.record("otel.status_code", "ERROR");
    }
    let status = status.as_str().to_owned();
    counter!(
        telemetry::HTTP_REQUESTS, "method" => method, "route" => below.clone(), "status" => status
    )
    .increment(1);
    histogram!(telemetry::HTTP_DURATION, "method" => method, "route" => below).record(took);
}

/// Anybody may make up methods; each would be a series of its own.
fn known(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}
