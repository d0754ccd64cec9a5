//! Callers are told that their jobs have ended: at least once, signed, and nowhere that is private.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix_web::{App, HttpRequest, HttpResponse, HttpServer, web};
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use t2m::clerk::webhook::WebhookVerifier;
use t2m::clock::Clock;

use crate::clients;
use crate::server::{LOG_FILE, Server, Setup, ask, claims, signed};

const ADA: &str = "user_ada";
const SECRET: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
const OLD_SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const PATIENCE: Duration = Duration::from_secs(60);

/// One request of the server's.
#[derive(Debug, Clone)]
struct Call {
    headers: Vec<(String, Vec<u8>)>,
    query: String,
    body: Vec<u8>,
}

impl Call {
    fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(it, _)| it == name);
        found.and_then(|(_, value)| std::str::from_utf8(value).ok()).unwrap_or_default()
    }

    /// After checking who sent it.
    fn body(&self) -> Value {
        for secret in [SECRET, OLD_SECRET] {
            let headers = self.headers.iter().map(|(name, value)| (name.as_str(), &value[..]));
            let verifier = WebhookVerifier::parse(secret).unwrap();
            let verified = verifier.verify(headers, &self.body, Clock::system().now());
            assert_eq!(verified.unwrap().0, self.header("webhook-id"));
        }
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// The other side: answers with these statuses in turn, the last one for ever.
#[derive(Clone)]
struct Receiver {
    address: String,
    calls: Arc<Mutex<Vec<Call>>>,
    statuses: Arc<Mutex<Vec<u16>>>,
}

impl Receiver {
    fn start(statuses: &[u16]) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let statuses = Arc::new(Mutex::new(statuses.to_vec()));
        let receiver = Self { address, calls: Arc::default(), statuses };
        let data = web::Data::new(receiver.clone());
        std::thread::spawn(move || {
            actix_web::rt::System::new().block_on(async move {
                let app = move || App::new().app_data(data.clone()).default_service(web::to(take));
                HttpServer::new(app).workers(1).listen(listener).unwrap().run().await.unwrap();
            });
        });
        receiver
    }

    fn url(&self) -> String {
        format!("{}/hook?token=a-secret-in-the-query", self.address)
    }

    fn answer(&self, statuses: &[u16]) {
        *self.statuses.lock().unwrap() = statuses.to_vec();
    }

    fn seen(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    async fn calls(&self, count: usize) -> Vec<Call> {
        until(|| async { Some(self.seen()).filter(|calls| calls.len() >= count) }).await
    }
}

async fn take(
    receiver: web::Data<Receiver>,
    request: HttpRequest,
    body: web::Bytes,
) -> HttpResponse {
    let headers = request.headers().iter();
    let headers = headers.map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()));
    let query = request.query_string().to_owned();
    let call = Call { headers: headers.collect(), query, body: body.to_vec() };
    receiver.calls.lock().unwrap().push(call);
    let mut statuses = receiver.statuses.lock().unwrap();
    let status = if statuses.len() > 1 { statuses.remove(0) } else { statuses[0] };
    HttpResponse::build(status.try_into().unwrap()).finish()
}

async fn until<T, F: Future<Output = Option<T>>>(look: impl Fn() -> F) -> T {
    let looking = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, looking).await.expect("it comes about")
}

fn setup(delays: &str) -> Setup {
    Setup::clerk()
        .with("CALLBACK_SIGNING_SECRET", format!("{SECRET},{OLD_SECRET}"))
        .with("CALLBACK_ALLOW_PRIVATE", "true")
        .with("CALLBACK_RETRY_SCHEDULE", delays)
}

async fn generate(server: &Server, url: &str) -> String {
    let body = json!({ "prompt": "a pier", "callback_url": url });
    let job = server.post(ADA, "videos/generate", &body).await.data(202);
    assert!(!job.to_string().contains("callback"), "{job}");
    job["job_id"].as_str().unwrap().to_owned()
}

/// By a request of this id.
const CANCELLING: &str = "req_cancelling";

async fn cancel(server: &Server, job: &str) {
    let request = server.request_of(ADA, Method::POST, &format!("jobs/{job}/cancel"));
    ask(request.header("x-request-id", CANCELLING).json(&json!({}))).await.data(200);
}

async fn callbacks(server: &Server, job: &str) -> Value {
    server.get(ADA, &format!("jobs/{job}/callbacks")).await.data(200)
}

/// The job's only callback, once `fits` says so.
async fn callback(server: &Server, job: &str, fits: impl Fn(&Value) -> bool) -> Value {
    let fits = &fits;
    until(|| async move {
        let items = callbacks(server, job).await["items"].take();
        assert!(items.as_array().unwrap().len() < 2, "{items}");
        Some(items[0].clone()).filter(|item| item.is_object() && fits(item))
    })
    .await
}

#[tokio::test]
async fn an_end_is_told_until_it_is_heard_and_then_no_more() {
    let receiver = Receiver::start(&[500, 302, 200]);
    let log = tempfile::NamedTempFile::new().unwrap();
    let setup = setup("0s,10ms,10ms,10ms")
        .with("RUST_LOG", "trace")
        .with(LOG_FILE, log.path().to_str().unwrap());
    let server = Server::start(setup);
    let job = generate(&server, &receiver.url()).await;
    assert_eq!(callbacks(&server, &job).await["items"], json!([]));
    cancel(&server, &job).await;
    let item = callback(&server, &job, |item| item["delivered"] == true).await;
    assert_eq!((&item["type"], &item["next_attempt_at"]), (&json!("job.cancelled"), &Value::Null));
    let statuses: Vec<_> =
        item["attempts"].as_array().unwrap().iter().map(|it| it["status"].clone()).collect();
    assert_eq!(statuses, [500, 302, 200]);
    let shown = server.get(ADA, &format!("jobs/{job}")).await.data(200);
    let calls = receiver.seen();
    assert_eq!(calls.len(), 3);
    for call in &calls {
        let body = call.body();
        assert_eq!(body["type"], "job.cancelled");
        assert!(body["timestamp"].is_string());
        assert_eq!(body["data"], shown);
        assert_eq!(call.header("webhook-id"), item["id"]);
        assert_eq!(call.query, "token=a-secret-in-the-query");
        assert_eq!(call.header("x-request-id"), CANCELLING);
        assert_eq!(call.header("content-type"), "application/json");
        assert_eq!(call.header("authorization"), "");
    }
    assert_eq!(callbacks(&server, &job).await["callback_url"], receiver.url());
    let others = server.get("user_bob", &format!("jobs/{job}/callbacks")).await;
    others.assert_refused(404, "not_found");
    let printed = std::fs::read_to_string(log.path()).unwrap();
    assert!(printed.len() > 1000 && !printed.contains("a-secret-in-the-query"), "{printed}");
}

#[tokio::test]
async fn a_killed_server_forgets_no_callback_and_repeats_none_that_was_noted() {
    let receiver = Receiver::start(&[200]);
    let server = Server::start(setup("0s,1s,1s,1s,1s,1s,1s,1s"));
    let told = generate(&server, &receiver.url()).await;
    cancel(&server, &told).await;
    callback(&server, &told, |item| item["delivered"] == true).await;
    receiver.answer(&[503]);
    let untold = generate(&server, &receiver.url()).await;
    cancel(&server, &untold).await;
    callback(&server, &untold, |item| !item["attempts"].as_array().unwrap().is_empty()).await;
    let mut server = server;
    server.kill();
    let before = receiver.seen().len();
    // With another read model, which is built anew from the log.
    for entry in std::fs::read_dir(server.data_dir()).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("views") {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
    receiver.answer(&[200]);
    let server = server.start_again();
    let item = callback(&server, &untold, |item| item["delivered"] == true).await;
    let attempts = item["attempts"].as_array().unwrap();
    assert!(attempts.len() >= 2 && attempts[0]["status"] == 503, "{item}");
    let again = callback(&server, &told, |_| true).await;
    assert_eq!(again["attempts"].as_array().unwrap().len(), 1, "{again}");
    let later = &receiver.seen()[before..];
    assert!(later.iter().all(|call| call.header("webhook-id") == item["id"]), "{later:?}");

    // Also when nobody knows any more how far the log was read.
    let mut server = server;
    server.kill();
    std::fs::remove_file(server.data_dir().join("callbacks-position")).unwrap();
    let count = receiver.seen().len();
    let server = server.start_again();
    let third = generate(&server, &receiver.url()).await;
    cancel(&server, &third).await;
    callback(&server, &third, |item| item["delivered"] == true).await;
    assert_eq!(receiver.seen().len(), count + 1, "only the new one is told");
}

#[tokio::test]
async fn each_end_of_a_retried_job_is_told_under_an_id_of_its_own() {
    let receiver = Receiver::start(&[410]);
    let server = Server::start(setup("0s,10ms"));
    let job = generate(&server, &receiver.url()).await;
    cancel(&server, &job).await;
    let item = callback(&server, &job, |item| item["attempts"][0]["status"] == 410).await;
    assert_eq!((&item["delivered"], &item["next_attempt_at"]), (&json!(false), &Value::Null));
    receiver.answer(&[200]);
    server.post(ADA, &format!("jobs/{job}/retry"), &json!({})).await.data(200);
    cancel(&server, &job).await;
    let calls = receiver.calls(2).await;
    assert_ne!(calls[0].header("webhook-id"), calls[1].header("webhook-id"));
    assert_eq!(calls.len(), 2);
}

#[tokio::test]
async fn an_official_library_takes_what_is_sent() {
    let receiver = Receiver::start(&[200]);
    let server = Server::start(setup("0s"));
    let job = generate(&server, &receiver.url()).await;
    cancel(&server, &job).await;
    let call = receiver.calls(1).await.remove(0);
    let names = ["webhook-id", "webhook-timestamp", "webhook-signature"];
    let headers: Vec<_> = names.iter().map(|name| json!([name, call.header(name)])).collect();
    use base64::Engine as _;
    let body = base64::engine::general_purpose::STANDARD.encode(&call.body);
    let case = |secret: &str| {
        json!({
            "name": "callback", "secret": secret, "headers": headers, "body_b64": body,
            "now": crate::server::now(),
        })
    };
    let other = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
    let cases = json!([case(SECRET), case(OLD_SECRET), case(other)]);
    for script in ["verdicts.mjs", "verdicts.py"] {
        assert_eq!(clients::run(script, &cases), json!([true, true, false]), "{script}");
    }
}

#[tokio::test]
async fn an_address_that_is_not_allowed_is_refused_and_nothing_is_asked_for() {
    // The default, in development too.
    let server = Server::start(Setup::clerk());
    let end = server.log_position().await;
    let long = format!("https://example.com/{}", "x".repeat(2048));
    for url in [
        "http://127.0.0.1:9/",
        "http://localhost/",
        "http://[::1]/",
        "http://10.0.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://0x7f.1/",
        "http://[::ffff:10.0.0.1]/",
        "ftp://example.com/",
        "https://user:pass@example.com/",
        "nonsense",
        "",
        &long,
    ] {
        let body = json!({ "prompt": "a pier", "callback_url": url });
        let answer = server.post(ADA, "videos/generate", &body).await;
        answer.assert_refused(422, "validation_failed");
        assert!(answer.body["detail"]["fields"]["callback_url"].is_string(), "{}", answer.body);
        let mut claims = claims(ADA);
        claims["subscription_tier"] = json!("premium");
        let batch = server.request(Method::POST, "videos/batch").bearer_auth(signed(&claims));
        let answer = ask(batch.json(&json!({ "jobs": [body] }))).await;
        answer.assert_refused(422, "validation_failed");
        assert!(answer.body["detail"]["fields"]["jobs[0].callback_url"].is_string(), "{url}");
        if !url.is_empty() {
            let form = Form::new().part("file", Part::text("Hello").file_name("a.txt"));
            let form = form.text("callback_url", url.to_owned());
            let request = server.request_of(ADA, Method::POST, "translations").multipart(form);
            let answer = ask(request).await;
            answer.assert_refused(422, "validation_failed");
            assert!(answer.body["detail"]["fields"]["callback_url"].is_string(), "{url}");
        }
    }
    for deadline in [json!(0), json!(604_801), json!("soon"), json!(-1)] {
        let body = json!({ "prompt": "a pier", "deadline_s": deadline });
        let answer = server.post(ADA, "videos/generate", &body).await;
        answer.assert_refused(422, "validation_failed");
        assert!(answer.body["detail"]["fields"]["deadline_s"].is_string(), "{deadline}");
    }
    let happened = server.printed(&["log", "show"]);
    assert!(!happened.contains("job.requested"), "{happened} after {end}");
}

#[tokio::test]
async fn a_batch_and_a_translation_are_told_of_too() {
    let receiver = Receiver::start(&[204]);
    let server = Server::start(setup("0s"));
    let mut claims = claims(ADA);
    claims["subscription_tier"] = json!("premium");
    let body = json!({ "jobs": [
        { "prompt": "one", "callback_url": receiver.url() }, { "prompt": "two" },
    ] });
    let batch = server.request(Method::POST, "videos/batch").bearer_auth(signed(&claims));
    let jobs = ask(batch.json(&body)).await.data(202)["jobs"].take();
    let form = Form::new().part("file", Part::text("Hello").file_name("a.txt"));
    let form = form.text("callback_url", receiver.url()).text("deadline_s", "600");
    let request = server.request_of(ADA, Method::POST, "translations").multipart(form);
    let translation = ask(request).await.data(202);
    assert!(translation["deadline"].is_string(), "{translation}");
    for job in [&jobs[0], &jobs[1], &translation] {
        cancel(&server, job["job_id"].as_str().unwrap()).await;
    }
    let calls = receiver.calls(2).await;
    let mut told: Vec<_> = calls.iter().map(|call| call.body()["data"]["job_id"].clone()).collect();
    let mut expected = vec![jobs[0]["job_id"].clone(), translation["job_id"].clone()];
    told.sort_by_key(Value::to_string);
    expected.sort_by_key(Value::to_string);
    assert_eq!(told, expected);
}

#[tokio::test]
async fn a_job_fails_at_its_deadline_and_its_render_stops() {
    let receiver = Receiver::start(&[200]);
    let server = Server::start(setup("0s").with("T2M_ENGINE", "storyboard"));
    let mut claims = claims(ADA);
    claims["subscription_tier"] = json!("premium");
    // Minutes of work.
    let body = json!({
        "prompt": "a long way", "duration": 60, "quality": "4k", "deadline_s": 3,
        "callback_url": receiver.url(),
    });
    let request = || {
        let request = server.request(Method::POST, "videos/generate");
        let request = request.bearer_auth(signed(&claims)).header("idempotency-key", "k");
        request.json(&body)
    };
    let job = ask(request()).await.data(202);
    let again = ask(request()).await;
    assert_eq!(again.header("idempotent-replayed"), "true");
    assert_eq!(again.data(202)["deadline"], job["deadline"], "the first one holds");
    let job = job["job_id"].as_str().unwrap().to_owned();
    let call = receiver.calls(1).await.remove(0).body();
    assert_eq!(call["type"], "job.failed");
    let error = call["data"]["error"].as_str().unwrap();
    assert!(error.starts_with("deadline_exceeded: "), "{error}");
    // The engine is free again: what it was drawing is cleared away, and another job is begun.
    let next = server.generate("user_bob", "next").await;
    let mut events = server.events("user_bob", &format!("jobs/{next}/events"), Some(0)).await;
    while events.next().await.unwrap().kind != "job.leased" {}
    assert!(!server.data_dir().join("scratch/video").join(&job).exists());
    let retry = server.post(ADA, &format!("jobs/{job}/retry"), &json!({})).await;
    retry.assert_refused(409, "conflict");
}

#[test]
fn a_malformed_secret_is_refused_at_the_start_and_not_shown() {
    let dir = tempfile::tempdir().unwrap();
    let setup = Setup::development().with("CALLBACK_SIGNING_SECRET", "whsec_not base64!");
    let output = setup.run(dir.path(), &["serve"]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(errors.contains("CALLBACK_SIGNING_SECRET") && !errors.contains("base64!"), "{errors}");
}
