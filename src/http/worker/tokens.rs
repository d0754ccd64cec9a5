//! Who is a worker: whoever has one of its tokens.

use actix_web::body::BoxBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::middleware::Next;
use actix_web::{Error, HttpRequest, web};
use aws_lc_rs::constant_time::verify_slices_are_equal;
use sha2::{Digest, Sha256};

use crate::config::Secret;
use crate::http::app::App;
use crate::http::identity::bearer;
use crate::http::problem::{Code, Problem};

/// The bearer tokens that workers may have, as digests: of equal length, so that comparing them
/// takes the same time whatever is sent.
pub struct WorkerTokens(Vec<[u8; 32]>);

impl WorkerTokens {
    pub fn new(tokens: &[Secret]) -> Self {
        Self(tokens.iter().map(|token| Sha256::digest(token.reveal()).into()).collect())
    }

    fn contains(&self, token: &str) -> bool {
        let digest: [u8; 32] = Sha256::digest(token).into();
        // All are compared, so that the time does not tell which.
        let same = self.0.iter().filter(|known| verify_slices_are_equal(*known, &digest).is_ok());
        same.count() > 0
    }
}

/// Stands before the handlers for workers, before a body is read.
pub async fn guard(
    request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    match admit(request.request()) {
        Ok(()) => next.call(request).await,
        Err(problem) => Ok(request.error_response(problem)),
    }
}

fn admit(request: &HttpRequest) -> Result<(), Problem> {
    let app = request.app_data::<web::Data<App>>();
    let app = app
        .ok_or_else(|| Problem::new(Code::InternalError).caused_by("the app's data is missing"))?;
    match app.worker_tokens.contains(bearer(request)?) {
        true => Ok(()),
        false => Err(Problem::new(Code::TokenInvalid)),
    }
}
