//! What stands before every route: keeps a budget for those who are nobody, and tells on the way
//! out what was found out about the caller on the way in.

use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header;
use actix_web::middleware::Next;
use actix_web::{Error, HttpMessage, HttpRequest, HttpResponse, web};

use super::app::App;
use super::identity::RefreshRecommended;
use super::problem::{Code, Problem};
use super::rates::Standing;
use super::tus;

/// A middleware, inside of the one for CORS.
pub async fn gate(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let mut response = next.call(request).await?.map_into_boxed_body();
    if is_of_nobody(&response)
        && let Err(problem) = count_address(response.request())
    {
        response = response.into_response(HttpResponse::from_error(problem));
    }
    let (standing, refresh) = {
        let extensions = response.request().extensions();
        (extensions.get::<Standing>().copied(), extensions.contains::<RefreshRecommended>())
    };
    let of_tus = response.request().path().contains("/files/tus");
    let headers = response.headers_mut();
    let mut tell = |name: &'static str, value: header::HeaderValue| {
        headers.insert(header::HeaderName::from_static(name), value);
    };
    if let Some(standing) = standing {
        tell("x-ratelimit-limit", standing.limit.into());
        tell("x-ratelimit-remaining", standing.remaining.into());
        tell("x-ratelimit-reset", standing.reset.into());
    }
    if of_tus {
        tell("tus-resumable", header::HeaderValue::from_static(tus::VERSION));
    }
    if refresh {
        tell("x-token-refresh", header::HeaderValue::from_static("recommended"));
    }
    Ok(response)
}

/// Before a public handler that is not for free.
pub async fn metered(
    request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    match count_address(request.request()) {
        Ok(()) => next.call(request).await,
        Err(problem) => Ok(request.error_response(problem)),
    }
}

/// Whether this is the refusal of a request that proved nothing about its sender. A good
/// signature is never counted, so that a burst of deliveries, or a user behind the same address,
/// is not locked out. Nor is a token that is merely over: its holder must hear that it needs
/// another one.
fn is_of_nobody(response: &ServiceResponse) -> bool {
    let problem = response.response().error().and_then(|error| error.as_error::<Problem>());
    problem.is_some_and(|problem| {
        matches!(
            problem.code(),
            Code::Unauthenticated
                | Code::TokenInvalid
                | Code::WebhookInvalid
                | Code::LinkSignatureInvalid
        )
    })
}

fn count_address(request: &HttpRequest) -> Result<(), Problem> {
    let Some(app) = request.app_data::<web::Data<App>>() else { return Ok(()) };
    let Some(address) = app.proxies.client(request) else { return Ok(()) };
    app.rates.take_anonymous(address, app.system.clock.now().timestamp()).into_result()
}
