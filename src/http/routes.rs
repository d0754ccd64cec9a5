//! The route table: every path, who may use it and what it does. The server, the answer to a wrong
//! method and the OpenAPI document are all made from it.

use actix_web::dev::ServiceRequest;
use actix_web::http::Method;
use actix_web::middleware::from_fn;
use actix_web::web::{self, ServiceConfig};
use utoipa::openapi::path::Parameter;

use super::app::PREFIXES;
use super::edges::unmatched;
use super::openapi::query;
use super::{
    admin, analytics, batch, callbacks, caller, dead_letters, files, gate, health, jobs, links, me,
    metrics, openapi, operations, replay, sessions, streams, translations, tus, webhooks, worker,
};

/// Who may use a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Public,
    Authenticated,
    /// Tier `premium` or `enterprise`.
    Premium,
    /// Role `admin`.
    Admin,
    /// This permission, or role `admin`.
    Permission(&'static str),
    /// A worker's token; no user.
    Worker,
}

/// One method of one path.
#[derive(Debug, Clone)]
pub struct Route {
    pub method: Method,
    /// Below the prefix, with a leading slash.
    pub path: &'static str,
    pub access: Access,
    pub summary: &'static str,
    pub body: Option<Body>,
    /// What its query or its headers may hold, beside what the fields below say.
    pub parameters: Option<fn() -> Vec<Parameter>>,
    /// Takes an `Idempotency-Key`.
    pub keyed: bool,
    /// The schema of `data` on success.
    pub data: Option<&'static str>,
    /// The media type of a success that is no `data`.
    pub media: Option<&'static str>,
    /// `data` is a page of them: it takes `limit` and `cursor`.
    pub paged: bool,
    /// The status on success.
    pub status: u16,
    /// Counts against the address it comes from.
    metered: bool,
    handler: fn() -> actix_web::Route,
}

/// What a request carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// JSON of this schema.
    Json(&'static str),
    /// A multipart form of this schema.
    Form(&'static str),
    /// Bytes of this media type.
    Bytes(&'static str),
}

const fn route(
    method: Method,
    path: &'static str,
    access: Access,
    summary: &'static str,
    handler: fn() -> actix_web::Route,
) -> Route {
    Route {
        method,
        path,
        access,
        summary,
        body: None,
        parameters: None,
        keyed: false,
        data: None,
        media: None,
        paged: false,
        status: 200,
        metered: false,
        handler,
    }
}

impl Route {
    const fn takes(mut self, schema: &'static str) -> Self {
        self.body = Some(Body::Json(schema));
        self
    }

    const fn takes_form(mut self, schema: &'static str) -> Self {
        self.body = Some(Body::Form(schema));
        self
    }

    const fn takes_bytes(mut self, media_type: &'static str) -> Self {
        self.body = Some(Body::Bytes(media_type));
        self
    }

    const fn asks(mut self, parameters: fn() -> Vec<Parameter>) -> Self {
        self.parameters = Some(parameters);
        self
    }

    const fn keyed(mut self) -> Self {
        self.keyed = true;
        self
    }

    const fn gives(mut self, schema: &'static str) -> Self {
        self.data = Some(schema);
        self
    }

    const fn sends(mut self, media_type: &'static str) -> Self {
        self.media = Some(media_type);
        self
    }

    const fn pages_of(mut self, schema: &'static str) -> Self {
        self.paged = true;
        self.gives(schema)
    }

    const fn metered(mut self) -> Self {
        self.metered = true;
        self
    }

    const fn created(mut self) -> Self {
        self.status = 201;
        self
    }

    const fn no_content(mut self) -> Self {
        self.status = 204;
        self
    }

    const fn accepted(mut self) -> Self {
        self.status = 202;
        self
    }

    /// The handler, behind what its row asks for: nothing else decides who may use it.
    fn guarded(&self) -> actix_web::Route {
        let handler = (self.handler)();
        match self.access {
            Access::Public if self.metered => handler.wrap(from_fn(gate::metered)),
            Access::Public => handler,
            Access::Worker => handler.wrap(from_fn(worker::guard)),
            access => handler.wrap(from_fn(move |request: ServiceRequest, next| {
                caller::guard(access, request, next)
            })),
        }
    }
}

/// Every route, in the order of the contract.
#[rustfmt::skip]
pub fn table() -> Vec<Route> {
    use Access::{Admin, Authenticated, Premium, Public, Worker};
    const GET: Method = Method::GET;
    const HEAD: Method = Method::HEAD;
    const POST: Method = Method::POST;
    const PUT: Method = Method::PUT;
    const PATCH: Method = Method::PATCH;
    const DELETE: Method = Method::DELETE;
    const OPTIONS: Method = Method::OPTIONS;
    vec![
        route(GET, "/auth/health", Public, "Liveness", || web::get().to(health::health)).gives("Health"),
        route(GET, "/system/health", Public, "Liveness", || web::get().to(health::health)).gives("Health"),
        route(GET, "/system/ready", Public, "Whether the log is writable and the read model caught up", || web::get().to(health::ready)).asks(query::<health::ReadyQuery>).gives("Readiness"),
        route(GET, "/metrics", Public, "Metrics in Prometheus' text format; also without a prefix", || web::get().to(metrics::metrics)).sends("text/plain"),
        route(POST, "/webhooks/clerk", Public, "A delivery of Clerk's, signed by Svix", || web::post().to(webhooks::receive)).asks(webhooks::signing).takes("Delivery").gives("Acknowledged"),
        route(POST, "/auth/webhook", Public, "The same", || web::post().to(webhooks::receive)).asks(webhooks::signing).takes("Delivery").gives("Acknowledged"),
        route(GET, "/openapi.json", Public, "This document", || web::get().to(openapi::document)).metered().sends("application/json"),
        route(GET, "/files/secure/{id}", Public, "A file by its signed link", || web::get().to(links::secure)).asks(query::<links::LinkQuery>).sends("*/*"),
        route(HEAD, "/files/secure/{id}", Public, "The same without its bytes", || web::head().to(links::secure)).asks(query::<links::LinkQuery>),
        route(GET, "/me", Authenticated, "The caller", || web::get().to(me::me)).gives("MeAnswer"),
        route(POST, "/onboarding", Authenticated, "How far the caller's onboarding is", || web::post().to(me::progress)).gives("OnboardingAnswer").takes("OnboardingRequest"),
        route(GET, "/session-token", Authenticated, "The caller's claims, for debugging; not in production", || web::get().to(me::claims)).gives("ClaimsAnswer"),
        route(GET, "/sessions", Authenticated, "The caller's devices", || web::get().to(sessions::list)).pages_of("SessionAnswer"),
        route(PATCH, "/sessions/current", Authenticated, "Remember this session, or stop to", || web::patch().to(sessions::remember)).gives("SessionAnswer").takes("Remember"),
        route(POST, "/sessions/current/activity", Authenticated, "The user is active", || web::post().to(sessions::touch)).gives("SessionAnswer"),
        route(DELETE, "/sessions/current", Authenticated, "End this session", || web::delete().to(sessions::revoke_current)).gives("SessionEnded"),
        route(DELETE, "/sessions/{id}", Authenticated, "End a session", || web::delete().to(sessions::revoke)).gives("SessionEnded"),
        route(POST, "/files/upload", Authenticated, "Store a file (multipart, field `file`)", || web::post().to(files::store)).takes_form("UploadForm").keyed().gives("UploadAnswer"),
        route(OPTIONS, "/files/tus", Public, "What uploads in pieces (tus 1.0) may ask for", || web::method(Method::OPTIONS).to(tus::options)).no_content(),
        route(POST, "/files/tus", Authenticated, "Begin an upload in pieces", || web::post().to(tus::create)).keyed().created().asks(tus::parameters::creating),
        route(HEAD, "/files/tus/{id}", Authenticated, "How far an upload is", || web::head().to(tus::show)).asks(tus::parameters::speaking),
        route(PATCH, "/files/tus/{id}", Authenticated, "The next piece of an upload", || web::patch().to(tus::append)).takes_bytes(tus::PIECE).no_content().asks(tus::parameters::appending),
        route(DELETE, "/files/tus/{id}", Authenticated, "End an upload", || web::delete().to(tus::terminate)).no_content().asks(tus::parameters::speaking),
        route(POST, "/files/tus/{id}", Authenticated, "The same, for clients that cannot send PATCH or DELETE (`X-HTTP-Method-Override`)", || web::post().to(tus::overridden)).no_content().asks(tus::parameters::overriding),
        route(GET, "/files", Authenticated, "The caller's files", || web::get().to(files::list)).pages_of("FileAnswer"),
        route(GET, "/files/{id}", Authenticated, "One file", || web::get().to(files::show)).gives("FileAnswer"),
        route(DELETE, "/files/{id}", Authenticated, "Delete a file", || web::delete().to(files::delete)).gives("FileDeleted"),
        route(POST, "/files/{id}/signed-url", Authenticated, "A link to a file", || web::post().to(links::of_file)).takes("LinkRequest").gives("LinkAnswer"),
        route(POST, "/videos/generate", Authenticated, "Ask for a video", || web::post().to(jobs::generate)).keyed().takes("VideoRequest").gives("JobAnswer").accepted(),
        route(POST, "/videos/batch", Premium, "Ask for up to 100 videos at once", || web::post().to(batch::generate)).keyed().takes("BatchRequest").gives("BatchAnswer").accepted(),
        route(GET, "/videos", Authenticated, "The caller's videos", || web::get().to(jobs::videos)).pages_of("JobAnswer"),
        route(POST, "/videos/{id}/signed-url", Authenticated, "A link to a finished video", || web::post().to(links::of_video)).takes("LinkRequest").gives("LinkAnswer"),
        route(GET, "/jobs", Authenticated, "The caller's jobs", || web::get().to(jobs::list)).asks(query::<jobs::FilterQuery>).pages_of("JobAnswer"),
        route(GET, "/jobs/{id}", Authenticated, "One job", || web::get().to(jobs::show)).gives("JobAnswer"),
        route(GET, "/status/{id}", Authenticated, "The same", || web::get().to(jobs::show)).gives("JobAnswer"),
        route(POST, "/jobs/{id}/cancel", Authenticated, "Stop a job", || web::post().to(jobs::cancel)).gives("JobAnswer"),
        route(POST, "/jobs/{id}/retry", Authenticated, "Try a failed or cancelled job again", || web::post().to(jobs::retry)).gives("JobAnswer"),
        route(GET, "/jobs/{id}/callbacks", Authenticated, "What became of a job's callbacks", || web::get().to(callbacks::list)).gives("CallbacksAnswer"),
        route(GET, "/jobs/{id}/events", Authenticated, "A job's events (Server-Sent Events)", || web::get().to(streams::of_job)).asks(streams::resuming).sends(streams::MEDIA_TYPE),
        route(POST, "/translations", Authenticated, "Ask for a translation (multipart, field `file`)", || web::post().to(translations::request)).takes_form("TranslationForm").keyed().gives("JobAnswer").accepted(),
        route(POST, "/uploadfile", Authenticated, "The same, for clients that drop the slash", || web::post().to(translations::upload_file)).takes_form("TranslationForm").keyed().gives("JobAnswer"),
        route(POST, "/uploadfile/", Authenticated, "The same, as the translation app's client asks for it; also without a prefix", || web::post().to(translations::upload_file)).takes_form("TranslationForm").keyed().gives("JobAnswer"),
        route(GET, "/events", Authenticated, "The caller's events (Server-Sent Events)", || web::get().to(streams::of_user)).asks(streams::resuming).sends(streams::MEDIA_TYPE),
        route(GET, "/admin/users", Admin, "All users", || web::get().to(admin::users)).pages_of("UserAnswer"),
        route(GET, "/admin/users/{id}", Admin, "One user", || web::get().to(admin::user)).gives("UserAnswer"),
        route(PUT, "/admin/users/{id}/access", Admin, "Role, permissions and tier of a user", || web::put().to(admin::set_access)).gives("UserAnswer").takes("AccessRequest"),
        route(PUT, "/admin/users/{id}/feature-flags", Admin, "Feature flags of a user", || web::put().to(admin::set_flags)).gives("UserAnswer").takes("FlagsRequest"),
        route(PUT, "/admin/users/{id}/organization", Admin, "Type and organization of a user", || web::put().to(admin::set_organization)).gives("UserAnswer").takes("OrganizationRequest"),
        route(GET, "/admin/users/{id}/sessions", Admin, "A user's devices", || web::get().to(sessions::list_of_user)).pages_of("SessionAnswer"),
        route(DELETE, "/admin/users/{id}/sessions/{session_id}", Admin, "End a session of a user", || web::delete().to(sessions::revoke_of_user)).gives("SessionEnded"),
        route(GET, "/admin/analytics", Admin, "How much is used, by how many", || web::get().to(analytics::analytics)).gives("AnalyticsAnswer"),
        route(POST, "/admin/replay", Admin, "Build the read model anew from the log, or compare it", || web::post().to(replay::start)).gives("ReplayStatus").takes("ReplayRequest").accepted(),
        route(GET, "/admin/replay", Admin, "How far that is, and which views stand still", || web::get().to(replay::status)).gives("ReplayAnswer"),
        route(GET, "/admin/events", Admin, "Events of the log", || web::get().to(operations::events)).asks(query::<operations::Filter>).pages_of("EventAnswer"),
        route(GET, "/admin/system", Admin, "How the server is", || web::get().to(operations::system)).gives("SystemAnswer"),
        route(GET, "/admin/webhooks/dead", Admin, "Deliveries that could not be used", || web::get().to(dead_letters::list)).pages_of("DeadLetter"),
        route(POST, "/admin/webhooks/dead/{id}/retry", Admin, "Use such a delivery now", || web::post().to(dead_letters::retry)).gives("Acknowledged"),
        route(DELETE, "/admin/webhooks/dead/{id}", Admin, "Forget such a delivery", || web::delete().to(dead_letters::discard)).gives("LetterDiscarded"),
        route(POST, "/worker/lease", Worker, "Take a job, waiting for one if need be; 204 if none came", || web::post().to(worker::lease)).takes("LeaseRequest").gives("LeaseAnswer"),
        route(POST, "/worker/jobs/{id}/progress", Worker, "Say how far it is, which renews the lease", || web::post().to(worker::progress)).gives("ReportAnswer").takes("ProgressRequest"),
        route(PUT, "/worker/jobs/{id}/output", Worker, "Hand in an output: its bytes", || web::put().to(worker::output)).asks(query::<worker::OutputQuery>).takes_bytes("*/*").gives("HandedAnswer"),
        route(POST, "/worker/jobs/{id}/complete", Worker, "Complete the job with what was handed in", || web::post().to(worker::complete)).takes("CompleteRequest").gives("OutcomeAnswer"),
        route(POST, "/worker/jobs/{id}/fail", Worker, "End the attempt without a result", || web::post().to(worker::fail)).takes("FailRequest").gives("OutcomeAnswer"),
    ]
}

/// The routes that the translation app's client and Prometheus ask for without a prefix.
const AT_ROOT: [&str; 3] = ["/uploadfile", "/uploadfile/", "/metrics"];

/// Serves the table under each prefix, and the documentation page beside it.
pub fn configure(config: &mut ServiceConfig) {
    for path in AT_ROOT {
        let resource = web::resource(path).default_service(web::to(unmatched));
        let same = table().into_iter().filter(|route| route.path == path);
        config.service(same.fold(resource, |resource, route| resource.route(route.guarded())));
    }
    for prefix in PREFIXES {
        // A scope is passed over at one look; each path outside one would be a pattern to try.
        let mut scope = web::scope(prefix);
        let mut rest = table();
        while let Some(path) = rest.first().map(|route| route.path) {
            let (same, others) = rest.into_iter().partition(|route| route.path == path);
            rest = others;
            let resource = web::resource(path).default_service(web::to(unmatched));
            scope = scope.service(
                same.iter()
                    .fold(resource, |resource, route: &Route| resource.route(route.guarded())),
            );
        }
        config.service(scope.default_service(web::to(unmatched)));
    }
    config.configure(openapi::page);
}

/// Every path with its prefix, and its method.
pub fn all_paths() -> Vec<(String, Method)> {
    let with = |prefix: &'static str| {
        table().into_iter().map(move |route| (format!("{prefix}{}", route.path), route.method))
    };
    let at_root = table().into_iter().filter(|route| AT_ROOT.contains(&route.path));
    let at_root = at_root.map(|route| (route.path.to_owned(), route.method));
    PREFIXES.into_iter().flat_map(with).chain(at_root).collect()
}

/// The path below the prefix, with a leading slash; none if it is not ours.
pub fn without_prefix(path: &str) -> Option<&str> {
    match path {
        path if AT_ROOT.contains(&path) => Some(path),
        path => PREFIXES.iter().find_map(|prefix| path.strip_prefix(prefix)),
    }
}
