//! What every request passes on its way in and out: its id, a look at its origin, headers that
//! protect, one form for every error (panics included), and a line in our log.

use std::{
    any::Any,
    future::{Ready, ready},
    panic::AssertUnwindSafe,
    sync::Arc,
    time::Instant,
};

use actix_web::{
    Error, FromRequest, HttpMessage, HttpRequest, HttpResponse, ResponseError,
    body::{BoxBody, MessageBody},
    dev::{Payload, ResourceDef, ServiceRequest, ServiceResponse},
    error::InternalError,
    http::{
        ConnectionType, Method, StatusCode,
        header::{self, HeaderMap, HeaderName, HeaderValue},
    },
    middleware::Next,
    web,
};
use futures_util::FutureExt;
use tracing::Instrument;

use super::app::App;
use super::problem::{Code, Problem};
use super::trace;
use crate::actors::codec::is_request_id;

/// What our answers may load, and who may frame them: nothing and nobody. JSON needs neither.
const NOTHING: HeaderValue = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
/// The documentation page loads its own scripts, and styles that it makes itself.
const DOCS: HeaderValue = HeaderValue::from_static(
    "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; \
     base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
);
/// A year.
const HTTPS_ONLY: HeaderValue = HeaderValue::from_static("max-age=31536000");

static X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
static X_DEV_MODE: HeaderName = HeaderName::from_static("x-dev-mode");

/// Where request ids come from; in the app's data, so that only the clock makes ids.
#[derive(Clone)]
pub struct FreshIds(pub Arc<dyn Fn() -> String + Send + Sync>);

/// The id of this request, in its extensions and as an extractor: the caller's own, if it is 1 to
/// 128 visible ASCII characters, else a fresh one. It is the events' correlation id. In the extensions
/// of an answer it is the one that the answer bears instead, as the events do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestId {
    pub id: String,
    /// Sent by the caller, and not made here.
    pub is_given: bool,
}

impl FromRequest for RequestId {
    type Error = Problem;
    type Future = Ready<Result<Self, Problem>>;

    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        let id = req.extensions().get::<RequestId>().cloned();
        ready(id.ok_or_else(|| {
            Problem::new(Code::InternalError).caused_by("the edge middleware is not wrapped")
        }))
    }
}

/// The routes and their methods, for 405 with `Allow`. actix has no such list: a resource made by
/// `#[get]` simply does not match another method, so an unmatched request is looked up here.
#[derive(Debug, Default)]
pub struct Routes(Vec<(ResourceDef, Vec<Method>)>);

impl Routes {
    /// From pairs of pattern (`/api/jobs/{id}`) and method; patterns may repeat.
    pub fn new<P: AsRef<str>>(routes: impl IntoIterator<Item = (P, Method)>) -> Self {
        let mut table: Vec<(ResourceDef, Vec<Method>)> = Vec::new();
        for (pattern, method) in routes {
            let known = table.iter_mut().find(|(def, _)| def.pattern() == Some(pattern.as_ref()));
            match known {
                Some((_, methods)) => methods.push(method),
                None => table.push((ResourceDef::new(pattern.as_ref()), vec![method])),
            }
        }
        Self(table)
    }

    /// The methods of a path as `Allow` lists them; nothing if no route has it.
    pub fn allow(&self, path: &str) -> Option<String> {
        let (_, methods) = self.of(path)?;
        let mut names: Vec<&str> = methods.iter().map(Method::as_str).collect();
        names.sort_unstable();
        Some(names.join(", "))
    }

    /// The pattern of a path; nothing if no route has it.
    fn pattern(&self, path: &str) -> Option<&str> {
        self.of(path)?.0.pattern()
    }

    /// The first that fits, as actix itself chooses.
    fn of(&self, path: &str) -> Option<&(ResourceDef, Vec<Method>)> {
        self.0.iter().find(|(def, _)| def.is_match(path))
    }
}

/// The app's default service: 405 if the path has other methods, else 404.
pub async fn unmatched(req: HttpRequest) -> Result<HttpResponse, Problem> {
    let routes = req.app_data::<web::Data<Routes>>();
    Err(match routes.and_then(|routes| routes.allow(req.path())) {
        Some(allow) => Problem::method_not_allowed(&allow),
        None => Problem::new(Code::NotFound),
    })
}

/// A resource's default service, for one that knows its methods: `"GET, HEAD"`.
pub fn only(allow: &'static str) -> actix_web::Route {
    web::to(move || ready(HttpResponse::from_error(Problem::method_not_allowed(allow))))
}

/// The outermost middleware, by `middleware::from_fn(edge)`. An error of an inner middleware goes
/// on as an error whose response is complete; `test::try_call_service` shows it.
pub async fn edge(
    req: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let began = Instant::now();
    let request_id = request_id(&req);
    let id = request_id.id.clone();
    let method = req.method().clone();
    let protection = Protection::of(&req);
    let app = req.app_data::<web::Data<App>>().cloned();
    let _under_way = app.as_ref().map(|app| app.traffic.begin());
    // Kept for when the request does not come back: with a panic it is gone.
    let (uri, routes) = (req.uri().clone(), req.app_data::<web::Data<Routes>>().cloned());
    let span = trace::span(&req, &id);
    req.extensions_mut().insert(request_id);
    // No clone of the request may live across this call: actix writes to it on the way in.
    let called = async {
        match foreign_origin(&req) {
            Some(problem) => Err(problem.into()),
            None => next.call(req).await,
        }
    };
    let called = AssertUnwindSafe(called.instrument(span.clone())).catch_unwind().await;
    let outcome = called.unwrap_or_else(|panic| Err(panicked(panic.as_ref()).into()));
    // Another node, or the next process, takes what follows on this connection.
    let is_last = app.as_ref().is_some_and(|app| *app.stopping.borrow());
    match outcome {
        Ok(response) => {
            let mut response = in_one_form(response.map_into_boxed_body());
            let id = other_id(response.response()).unwrap_or(id);
            finish_headers(response.headers_mut(), &id, &protection);
            // The pattern, never the path or query: those hold ids, signatures and tokens.
            let route = response.request().match_pattern();
            let (status, error) = (response.status(), response.response().error());
            trace::answered(&span, &method, route.as_deref(), status, began.elapsed());
            log(&method, route.as_deref(), status, error, began, &id);
            if is_last {
                response.response_mut().head_mut().set_connection_type(ConnectionType::Close);
            }
            Ok(response)
        }
        Err(error) => {
            let mut response = match problem_instead(&error.error_response(), Some(&error)) {
                Some(problem) => problem.error_response(),
                None => error.error_response(),
            };
            finish_headers(response.headers_mut(), &id, &protection);
            let route = routes.as_ref().and_then(|routes| routes.pattern(uri.path()));
            trace::answered(&span, &method, route, response.status(), began.elapsed());
            log(&method, route, response.status(), Some(&error), began, &id);
            if is_last {
                response.head_mut().set_connection_type(ConnectionType::Close);
            }
            Err(InternalError::from_response(error, response).into())
        }
    }
}

fn request_id(req: &ServiceRequest) -> RequestId {
    let given = req.headers().get(&X_REQUEST_ID).map(HeaderValue::as_bytes).unwrap_or_default();
    let is_given = is_request_id(given);
    let id = match (is_given, req.app_data::<web::Data<FreshIds>>()) {
        (true, _) => String::from_utf8_lossy(given).into_owned(),
        (false, Some(ids)) => (ids.0)(),
        (false, None) => "unnumbered".to_owned(),
    };
    RequestId { id, is_given }
}

/// The id that an answer bears instead of its request's, which nobody chose.
fn other_id(response: &HttpResponse) -> Option<String> {
    let other = response.extensions().get::<RequestId>().map(|other| other.id.clone())?;
    is_request_id(other.as_bytes()).then_some(other)
}

/// CSRF: a browser says where a state-changing request comes from; compared exactly. It stands
/// before the headers for CORS, so that a refused origin never reads that it is allowed.
fn foreign_origin(req: &ServiceRequest) -> Option<Problem> {
    if matches!(*req.method(), Method::GET | Method::HEAD | Method::OPTIONS) {
        return None;
    }
    let mut origins = req.headers().get_all(header::ORIGIN);
    let first = origins.next()?;
    let app = req.app_data::<web::Data<App>>()?;
    let allowed = app.allowed_origins.iter().any(|allowed| allowed.as_bytes() == first.as_bytes());
    // Browsers send one; with two, whoever looks at the other one would judge otherwise.
    if allowed && origins.next().is_none() {
        return None;
    }
    let vary = HeaderValue::from_static("Origin");
    Some(Problem::new(Code::InvalidOrigin).with_header(header::VARY, vary))
}

fn panicked(panic: &(dyn Any + Send)) -> Problem {
    let words = panic.downcast_ref::<String>().map(String::as_str);
    let words = words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
    Problem::new(Code::InternalError).caused_by(format!("a handler panicked: {words}"))
}

/// Gives errors that actix words itself (a wrong path or query, a bare 405) our form.
fn in_one_form(response: ServiceResponse<BoxBody>) -> ServiceResponse<BoxBody> {
    let error = response.response().error();
    let Some(mut problem) = problem_instead(response.response(), error) else {
        return response;
    };
    let routes = response.request().app_data::<web::Data<Routes>>();
    let allow = routes.and_then(|routes| routes.allow(response.request().path()));
    if let (Code::MethodNotAllowed, Some(allow)) = (problem.code(), allow) {
        problem = Problem::method_not_allowed(&allow);
    }
    let (req, old) = response.into_parts();
    let mut new = HttpResponse::from_error(problem);
    for (name, value) in old.headers() {
        if *name != header::CONTENT_TYPE && !new.headers().contains_key(name) {
            new.headers_mut().append(name.clone(), value.clone());
        }
    }
    ServiceResponse::new(req, new)
}

fn problem_instead(response: &HttpResponse, error: Option<&Error>) -> Option<Problem> {
    let status = response.status();
    let json = response.headers().get(header::CONTENT_TYPE);
    let is_ours = json.is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    if is_ours || !(status.is_client_error() || status.is_server_error()) {
        return None;
    }
    let code = match status {
        StatusCode::UNAUTHORIZED => Code::Unauthenticated,
        StatusCode::FORBIDDEN => Code::Forbidden,
        StatusCode::NOT_FOUND => Code::NotFound,
        StatusCode::METHOD_NOT_ALLOWED => Code::MethodNotAllowed,
        StatusCode::REQUEST_TIMEOUT => Code::RequestTimeout,
        StatusCode::CONFLICT => Code::Conflict,
        StatusCode::PAYLOAD_TOO_LARGE => Code::PayloadTooLarge,
        StatusCode::UNSUPPORTED_MEDIA_TYPE => Code::UnsupportedMediaType,
        StatusCode::UNPROCESSABLE_ENTITY => Code::ValidationFailed,
        StatusCode::TOO_MANY_REQUESTS => Code::RateLimited,
        StatusCode::SERVICE_UNAVAILABLE => Code::Overloaded,
        status if status.is_client_error() => Code::MalformedRequest,
        _ => Code::InternalError,
    };
    let cause = error.map_or_else(|| format!("answered bare {status}"), ToString::to_string);
    Some(Problem::new(code).caused_by(cause))
}

/// What a browser is told about our answers, and everybody about a server that trusts them.
struct Protection {
    content_policy: HeaderValue,
    https_only: bool,
    dev_mode: bool,
}

impl Protection {
    fn of(req: &ServiceRequest) -> Self {
        let app = req.app_data::<web::Data<App>>();
        Self {
            content_policy: if req.path().starts_with("/docs") { DOCS } else { NOTHING },
            https_only: app.is_some_and(|app| app.public_url.starts_with("https://")),
            dev_mode: app.is_some_and(|app| app.dev_mode),
        }
    }
}

fn finish_headers(headers: &mut HeaderMap, id: &str, protection: &Protection) {
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert(X_REQUEST_ID.clone(), id);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    // A file has a stricter one of its own.
    if !headers.contains_key(header::CONTENT_SECURITY_POLICY) {
        headers.insert(header::CONTENT_SECURITY_POLICY, protection.content_policy.clone());
    }
    if protection.https_only {
        headers.insert(header::STRICT_TRANSPORT_SECURITY, HTTPS_ONLY);
    }
    if protection.dev_mode {
        headers.insert(X_DEV_MODE.clone(), HeaderValue::from_static("true"));
    }
    let json = headers.get(header::CONTENT_TYPE);
    let is_json = json.is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    if is_json && !headers.contains_key(header::CACHE_CONTROL) {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    // `ranges` says "identity" to keep the compressor off; RFC 9110 §8.4.1 wants it unsaid.
    if headers.get(header::CONTENT_ENCODING).is_some_and(|value| value == "identity") {
        headers.remove(header::CONTENT_ENCODING);
    }
}

fn log(
    method: &Method,
    route: Option<&str>,
    status: StatusCode,
    error: Option<&Error>,
    began: Instant,
    request_id: &str,
) {
    let ms = began.elapsed().as_secs_f64() * 1000.0;
    let (route, status) = (route.unwrap_or("unmatched"), status.as_u16());
    let problem = error.and_then(|error| error.as_error::<Problem>());
    let code = problem.map_or("", |problem| problem.code().name());
    match problem.and_then(Problem::cause) {
        Some(cause) if status >= 500 => {
            tracing::error!(%method, route, status, ms, request_id, code, cause, "request");
        }
        Some(cause) => {
            tracing::info!(%method, route, status, ms, request_id, code, cause, "request");
        }
        // Most lines say only that all is well; `RUST_LOG=t2m=debug` shows them.
        None if status < 400 => {
            tracing::debug!(%method, route, status, ms, request_id, "request");
        }
        None => tracing::info!(%method, route, status, ms, request_id, code, "request"),
    }
}

#[cfg(test)]
#[path = "edges_tests.rs"]
mod tests;
