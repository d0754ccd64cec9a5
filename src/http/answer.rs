//! The form of every success: `{"success":true,"data":…}`.

use actix_web::{HttpResponse, http::StatusCode};
use serde::Serialize;

/// 200 with `data`.
pub fn ok(data: impl Serialize) -> HttpResponse {
    with_status(StatusCode::OK, data)
}

/// 202 with `data`: the work has begun and is followed elsewhere.
pub fn accepted(data: impl Serialize) -> HttpResponse {
    with_status(StatusCode::ACCEPTED, data)
}

/// Another success with `data`.
pub fn with_status(status: StatusCode, data: impl Serialize) -> HttpResponse {
    #[derive(Serialize)]
    struct Answer<T> {
        success: bool,
        data: T,
    }
    HttpResponse::build(status).json(Answer { success: true, data })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[actix_web::test]
    async fn a_success_wraps_its_data() {
        let response = accepted(serde_json::json!({"job_id": 1}));
        assert_eq!(response.status(), 202);
        let body = actix_web::body::to_bytes(response.into_body()).await.unwrap();
        assert_eq!(body, r#"{"success":true,"data":{"job_id":1}}"#);
    }
}
