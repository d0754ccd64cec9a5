//! A stand-in of Clerk's Backend API, as strict as the official client allows: `clerk_api.rs` proves
//! it with that client. It notes every request, and can hold requests up or turn them away.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, mpsc};
use std::time::Duration;

use actix_web::dev::ServerHandle;
use actix_web::http::Method;
use actix_web::{App, HttpRequest, HttpResponse, HttpServer, web};
use serde_json::{Map, Value, json};
use t2m::clerk::api::{Api, unix_clock};
use t2m::clock::Clock;
use t2m::config::BackendApi;
use tokio::sync::{Semaphore, watch};

pub const SECRET_KEY: &str = "sk_test_4242";
const PATIENCE: Duration = Duration::from_secs(120);
/// What a request takes, so that those that are made at once are seen at once.
const LATENCY: Duration = Duration::from_millis(3);

/// A Clerk instance with users, and what was asked of it.
#[derive(Default)]
pub struct Instance {
    users: BTreeMap<String, Value>,
    pub noted: Vec<Noted>,
    /// So many writes are still answered with 429.
    pub turned_away: usize,
    under_way: usize,
    /// The most that were under way at once.
    pub most_under_way: usize,
    /// Requests from before this generation are never carried out.
    generation: usize,
}

/// A request as it arrived.
#[derive(Debug, Clone, PartialEq)]
pub struct Noted {
    pub method: String,
    pub path: String,
    pub query: BTreeMap<String, String>,
    pub headers: BTreeMap<&'static str, String>,
    pub body: Value,
}

impl Instance {
    pub fn add(&mut self, id: &str, public_metadata: Value) {
        let created_at = 1_767_225_600_000_i64 + i64::try_from(self.users.len()).unwrap();
        let user = json!({
            "id": id, "object": "user", "first_name": "Ada", "last_name": null,
            "primary_email_address_id": "idn_1",
            "email_addresses": [{ "id": "idn_1", "object": "email_address",
                "email_address": format!("{id}@example.com"), "linked_to": [],
                "verification": { "status": "verified", "strategy": "email_code" } }],
            "phone_numbers": [], "web3_wallets": [], "external_accounts": [],
            "enterprise_accounts": [], "public_metadata": public_metadata, "private_metadata": {},
            "unsafe_metadata": { "role": "admin" }, "banned": false, "locked": false,
            "created_at": created_at, "updated_at": created_at,
        });
        self.users.insert(id.to_owned(), user);
    }

    /// As if nobody had noticed: the time of the user's last change stays.
    pub fn set_metadata(&mut self, id: &str, public_metadata: Value) {
        self.users.get_mut(id).expect("it is there")["public_metadata"] = public_metadata;
    }

    /// As somebody at Clerk does it.
    pub fn change(&mut self, id: &str, public_metadata: Value) {
        self.set_metadata(id, public_metadata);
        let updated_at = &mut self.users.get_mut(id).expect("it is there")["updated_at"];
        *updated_at = json!(updated_at.as_i64().unwrap() + 1000);
    }

    pub fn forget(&mut self, id: &str) {
        self.users.remove(id);
    }

    pub fn user(&self, id: &str) -> &Value {
        &self.users[id]
    }

    pub fn metadata(&self, id: &str) -> &Value {
        &self.users[id]["public_metadata"]
    }

    /// The requests of this method whose path ends so.
    pub fn requests(&self, method: &str, path_end: &str) -> Vec<&Noted> {
        let wanted = |it: &&Noted| it.method == method && it.path.ends_with(path_end);
        self.noted.iter().filter(wanted).collect()
    }

    fn answer(&mut self, noted: &Noted) -> (u16, Value) {
        let path: Vec<&str> = noted.path.split('/').skip(1).collect();
        match (noted.method.as_str(), path.as_slice()) {
            ("GET", ["v1", "users"]) => (200, self.list(&noted.query)),
            ("GET", ["v1", "users", "count"]) => {
                (200, json!({ "object": "total_count", "total_count": self.users.len() }))
            }
            ("GET", ["v1", "users", id]) => self.users.get(*id).map_or_else(not_found, found),
            ("PATCH", ["v1", "users", id, "metadata"]) => self.merge(id, &noted.body),
            ("POST", ["v1", "sessions", id, "revoke"]) if noted.body.is_null() => {
                (200, json!({ "id": id, "object": "session", "status": "revoked" }))
            }
            _ => not_found(),
        }
    }

    /// Newest first. A limit outside of 1 to 500 silently means 10.
    fn list(&self, query: &BTreeMap<String, String>) -> Value {
        let number = |name: &str| query.get(name).and_then(|text| text.parse::<usize>().ok());
        let limit = number("limit").filter(|limit| (1..=500).contains(limit)).unwrap_or(10);
        assert_eq!(query.get("order_by").map(String::as_str), Some("-created_at"));
        let mut users: Vec<&Value> = self.users.values().collect();
        users.sort_by_key(|user| std::cmp::Reverse(user["created_at"].as_i64()));
        users.into_iter().skip(number("offset").unwrap_or(0)).take(limit).cloned().collect()
    }

    fn merge(&mut self, id: &str, body: &Value) -> (u16, Value) {
        const KINDS: [&str; 3] = ["public_metadata", "private_metadata", "unsafe_metadata"];
        let known =
            |(name, value): (&String, &Value)| KINDS.contains(&name.as_str()) && value.is_object();
        let Some(body) = body.as_object().filter(|body| body.iter().all(known)) else {
            return refusal(422, "form_param_unknown");
        };
        let Some(user) = self.users.get_mut(id) else { return not_found() };
        for (kind, patch) in body {
            merge(&mut user[kind], patch);
        }
        let updated_at = user["updated_at"].as_i64().unwrap() + 1;
        user["updated_at"] = updated_at.into();
        (200, user.clone())
    }
}

/// Objects are merged into each other, `null` removes, all else replaces.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Map::new().into();
    }
    let target = target.as_object_mut().unwrap();
    for (name, value) in patch {
        if value.is_null() {
            target.remove(name);
        } else {
            merge(target.entry(name.clone()).or_insert(Value::Null), value);
        }
    }
}

fn found(user: &Value) -> (u16, Value) {
    (200, user.clone())
}

fn not_found() -> (u16, Value) {
    refusal(404, "resource_not_found")
}

fn refusal(status: u16, code: &str) -> (u16, Value) {
    (status, json!({ "errors": [{ "code": code, "message": code, "long_message": code }] }))
}

/// A running stand-in; it stops when it is dropped.
pub struct Backend {
    pub url: String,
    shared: web::Data<Shared>,
    handle: ServerHandle,
}

struct Shared {
    instance: Mutex<Instance>,
    /// Writes wait for one of these each.
    gate: Semaphore,
    changed: watch::Sender<()>,
}

impl Drop for Backend {
    fn drop(&mut self) {
        // Not awaited: the request is sent when it is made.
        drop(self.handle.stop(false));
    }
}

impl Backend {
    pub fn start() -> Self {
        let shared = web::Data::new(Shared {
            instance: Mutex::default(),
            gate: Semaphore::new(Semaphore::MAX_PERMITS),
            changed: watch::Sender::new(()),
        });
        let (sender, receiver) = mpsc::channel();
        let data = shared.clone();
        std::thread::spawn(move || {
            actix_web::rt::System::new().block_on(async move {
                let server = HttpServer::new(move || {
                    App::new().app_data(data.clone()).default_service(web::to(receive))
                });
                let server = server.workers(1).disable_signals().bind("127.0.0.1:0").unwrap();
                let address = server.addrs()[0];
                let server = server.run();
                sender.send((address, server.handle())).unwrap();
                server.await.unwrap();
            });
        });
        let (address, handle) = receiver.recv().expect("the stand-in starts");
        Self { url: format!("http://{address}"), shared, handle }
    }

    /// What T2M is configured with to call it.
    pub fn settings(&self) -> BackendApi {
        let url = self.url.parse().expect("an address is a URL");
        BackendApi { secret_key: SECRET_KEY.to_owned().into(), url }
    }

    /// Our own client of it.
    pub fn api(&self) -> Api {
        Api::new(&self.settings(), unix_clock(&Clock::system())).expect("the client is set up")
    }

    pub fn instance(&self) -> MutexGuard<'_, Instance> {
        self.shared.instance.lock().expect("no request panicked")
    }

    /// Lets only so many more writes through.
    pub fn hold_writes_after(&self, count: usize) {
        self.shared.gate.forget_permits(Semaphore::MAX_PERMITS);
        self.shared.gate.add_permits(count);
    }

    /// Lets writes through again; those that were held up until now are never carried out.
    pub fn release_writes(&self) {
        self.instance().generation += 1;
        self.shared.gate.add_permits(Semaphore::MAX_PERMITS / 2);
    }

    /// Waits until the instance is so.
    pub async fn until(&self, so: impl Fn(&Instance) -> bool) {
        let mut changed = self.shared.changed.subscribe();
        let waiting = async {
            while !so(&self.instance()) {
                changed.changed().await.expect("the stand-in runs");
            }
        };
        let waited = tokio::time::timeout(PATIENCE, waiting).await;
        assert!(waited.is_ok(), "asked so far: {:#?}", self.instance().noted);
    }
}

const HEADERS: [&str; 3] = ["authorization", "content-type", "clerk-api-version"];

async fn receive(
    shared: web::Data<Shared>,
    request: HttpRequest,
    body: web::Bytes,
) -> HttpResponse {
    let header = |name: &'static str| {
        let value = request.headers().get(name)?.to_str().ok()?;
        Some((name, value.to_owned()))
    };
    let query = web::Query::<BTreeMap<String, String>>::from_query(request.query_string());
    let noted = Noted {
        method: request.method().to_string(),
        path: request.path().to_owned(),
        query: query.expect("a query is readable").into_inner(),
        headers: HEADERS.into_iter().filter_map(header).collect(),
        body: serde_json::from_slice(&body).unwrap_or(Value::Null),
    };
    let write = request.method() != Method::GET;
    let generation = begin(&shared, &noted);
    tokio::time::sleep(LATENCY).await;
    if write {
        shared.gate.acquire().await.expect("the gate is never closed").forget();
    }
    let answer = finish(&shared, &noted, write, generation);
    shared.changed.send_replace(());
    answer
}

fn begin(shared: &Shared, noted: &Noted) -> usize {
    let mut instance = shared.instance.lock().unwrap();
    instance.noted.push(noted.clone());
    instance.under_way += 1;
    instance.most_under_way = instance.most_under_way.max(instance.under_way);
    shared.changed.send_replace(());
    instance.generation
}

fn finish(shared: &Shared, noted: &Noted, write: bool, generation: usize) -> HttpResponse {
    let mut instance = shared.instance.lock().unwrap();
    instance.under_way -= 1;
    let header = |name| noted.headers.get(name).map(String::as_str).unwrap_or_default();
    let (status, body) = if header("authorization") != format!("Bearer {SECRET_KEY}") {
        refusal(401, "authorization_invalid")
    } else if header("content-type") != "application/json" {
        refusal(415, "unsupported_content_type")
    } else if generation != instance.generation {
        refusal(500, "too_late")
    } else if write && instance.turned_away > 0 {
        instance.turned_away -= 1;
        let (_, body) = refusal(429, "too_many_requests");
        return HttpResponse::TooManyRequests().insert_header(("retry-after", "1")).json(body);
    } else {
        instance.answer(noted)
    };
    HttpResponse::build(status.try_into().unwrap()).json(body)
}
