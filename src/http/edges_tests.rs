//! What the edge adds, catches and rewords.

use actix_web::{App, dev::Service, http::Method, middleware::from_fn, test};
use serde_json::{Value, json};

use super::*;

async fn handler_panics() -> HttpResponse {
    panic!("the secret reason")
}

async fn echo_id(id: RequestId) -> HttpResponse {
    super::super::answer::ok(json!({ "id": id.id, "is_given": id.is_given }))
}

/// Answers as a part of what another request brought about.
async fn of_another(id: web::Path<String>) -> HttpResponse {
    let mut response = HttpResponse::NoContent().finish();
    let id = id.replace('_', " ");
    response.extensions_mut().insert(RequestId { id, is_given: false });
    response
}

async fn number(path: web::Path<u32>) -> HttpResponse {
    HttpResponse::Ok().body(path.to_string())
}

struct Answer {
    status: u16,
    headers: HeaderMap,
    body: Value,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

async fn send(request: test::TestRequest) -> Answer {
    let ids = FreshIds(Arc::new(|| "fresh-1".to_owned()));
    let routes = [
        ("/id", Method::GET),
        ("/n/{n}", Method::GET),
        ("/n/{n}", Method::PUT),
        ("/panic/{n}", Method::GET),
    ];
    let app = App::new()
        .app_data(web::Data::new(ids))
        .app_data(web::Data::new(Routes::new(routes)))
        .wrap(from_fn(edge))
        .service(web::resource("/id").guard(actix_web::guard::Get()).to(echo_id))
        .service(web::resource("/n/{n}").route(web::get().to(number)))
        .service(web::resource("/own").route(web::get().to(echo_id)).default_service(only("GET")))
        .route("/panic/{n}", web::get().to(handler_panics))
        .route("/of/{id}", web::get().to(of_another))
        .default_service(web::to(unmatched));
    let app = test::init_service(app).await;
    let response = match app.call(request.to_request()).await {
        Ok(response) => response.into_parts().1,
        Err(error) => error.error_response(),
    };
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let bytes = actix_web::body::to_bytes(response.into_body()).await.unwrap();
    Answer { status, headers, body: serde_json::from_slice(&bytes).unwrap_or(Value::Null) }
}

fn get(path: &str) -> test::TestRequest {
    test::TestRequest::get().uri(path)
}

#[actix_web::test]
async fn a_visible_request_id_is_kept_and_another_replaced() {
    for (given, used) in [
        ("mine-1", "mine-1"),
        ("two words", "fresh-1"),
        ("", "fresh-1"),
        (&"x".repeat(129), "fresh-1"),
    ] {
        let answer = send(get("/id").insert_header(("x-request-id", given))).await;
        let is_given = given == used;
        assert_eq!(answer.body["data"], json!({ "id": used, "is_given": is_given }));
        assert_eq!(answer.header("x-request-id"), Some(used));
    }
}

#[actix_web::test]
async fn an_answer_may_bear_the_id_of_another_request_if_that_is_one() {
    for (named, used) in [("req-7", "req-7"), ("two_words", "fresh-1")] {
        let answer = send(get(&format!("/of/{named}"))).await;
        assert_eq!((answer.status, answer.header("x-request-id")), (204, Some(used)));
    }
}

#[actix_web::test]
async fn answers_carry_headers_that_protect() {
    let answer = send(get("/id")).await;
    assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    assert_eq!(answer.header("referrer-policy"), Some("no-referrer"));
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    let policy = "default-src 'none'; frame-ancestors 'none'";
    assert_eq!(answer.header("content-security-policy"), Some(policy));
    assert_eq!(answer.header("strict-transport-security"), None);
}

#[actix_web::test]
async fn a_panic_is_a_500_that_tells_nothing() {
    let answer = send(get("/panic/5")).await;
    assert_eq!(answer.status, 500);
    assert_eq!(answer.body["code"], "internal_error");
    assert!(!answer.body.to_string().contains("secret"));
    assert_eq!(answer.header("x-request-id"), Some("fresh-1"));
}

#[actix_web::test]
async fn a_panic_is_counted_for_the_route_it_happened_in() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let recording = metrics::set_default_local_recorder(&recorder);
    send(get("/panic/5")).await;
    drop(recording);
    let text = recorder.handle().render();
    let series = "t2m_http_requests_total{method=\"GET\",route=\"/panic/{n}\",status=\"500\"} 1";
    assert!(text.contains(series), "{text}");
}

#[actix_web::test]
async fn an_unknown_route_is_a_404_in_our_form() {
    let answer = send(get("/nowhere")).await;
    assert_eq!((answer.status, &answer.body["code"]), (404, &Value::from("not_found")));
}

#[actix_web::test]
async fn a_wrong_method_is_a_405_with_allow() {
    // A resource that guards itself, one with bare actix routes, one that knows its methods.
    for (path, allow) in [("/id", "GET"), ("/n/5", "GET, PUT"), ("/own", "GET")] {
        let answer = send(test::TestRequest::delete().uri(path)).await;
        assert_eq!((answer.status, answer.header("allow")), (405, Some(allow)), "{path}");
        assert_eq!(answer.body["code"], "method_not_allowed");
    }
}

#[actix_web::test]
async fn actixs_own_errors_take_our_form() {
    let answer = send(get("/n/abc")).await;
    assert_eq!(answer.status, 404);
    assert_eq!(answer.body["code"], "not_found");
    assert_eq!(answer.header("content-type"), Some("application/json"));
}
