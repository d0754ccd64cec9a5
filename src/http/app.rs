//! What every handler can reach, and how the server is put together.

use std::any::Any;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use actix_cors::Cors;
use actix_web::http::{Method, header};
use actix_web::middleware::from_fn;
use actix_web::{App as ActixApp, HttpServer, dev::Server, web};
use chrono::{DateTime, TimeDelta, Utc};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::watch;

use super::address::TrustedProxies;
use super::edges::{FreshIds, Routes, edge, only, unmatched};
use super::gate::gate;
use super::health;
use super::quota::Quotas;
use super::rates::Rates;
use super::traffic::Traffic;
use super::worker::WorkerTokens;
use super::{routes, tus};
use crate::actors::System;
use crate::actors::callbacks::Callbacks;
use crate::actors::dead_letters::DeadLetters;
use crate::actors::leasing::Leasing;
use crate::actors::rebuild::Rebuilds;
use crate::actors::secrets::Secrets;
use crate::clerk::Authenticator;
use crate::clerk::webhook::WebhookVerifier;
use crate::config::Retention;
use crate::media::blobs::Blobs;
use crate::media::signed_url::SigningSecrets;
use crate::media::uploads::Uploads;

/// Paths under which every route is served, the longer first: actix takes the first that fits.
pub const PREFIXES: [&str; 2] = ["/api/v1", "/api"];

/// How long all of stopping may take.
pub const STOP_WITHIN: Duration = Duration::from_secs(10);
/// For how long of it pieces of uploads may come to their own end.
pub const LAST_PIECES: Duration = Duration::from_secs(8);

/// What the handlers share.
pub struct App {
    pub system: Arc<System>,
    /// The name of the log's engine.
    pub log_engine: String,
    pub started_at: DateTime<Utc>,
    pub blobs: Arc<Blobs>,
    /// Those that come in pieces.
    pub uploads: Arc<Uploads>,
    /// How long such an upload may take.
    pub upload_lifetime: TimeDelta,
    pub quotas: Quotas,
    pub retention: Retention,
    /// What jobs must not show to anybody but their worker.
    pub secrets: Secrets,
    pub links: SigningSecrets,
    pub authenticator: Authenticator,
    /// Absent in development without a secret: then deliveries are answered with 503.
    pub webhooks: Option<WebhookVerifier>,
    /// Deliveries that could not be used.
    pub dead_letters: DeadLetters,
    /// The read model built anew at an administrator's word.
    pub rebuilds: Rebuilds,
    /// Jobs in the hands of workers.
    pub leasing: Arc<Leasing>,
    /// What is told to callers when their jobs have ended.
    pub callbacks: Callbacks,
    pub worker_tokens: WorkerTokens,
    /// The key set of the development issuer; absent when Clerk vouches for tokens.
    pub development_keys: Option<serde_json::Value>,
    pub rates: Rates,
    pub proxies: TrustedProxies,
    /// Without a trailing slash.
    pub public_url: String,
    pub allowed_origins: Vec<String>,
    pub max_upload_bytes: u64,
    /// Event streams that one user may have open at once.
    pub streams_per_user: usize,
    /// After how long a client that takes nothing of its answer is cut off.
    pub stalled_after: Duration,
    pub dev_mode: bool,
    pub production: bool,
    /// Users who have not finished onboarding are sent to finish it.
    pub require_onboarding: bool,
    /// What has been counted; none where nothing counts, as in a demo.
    pub metrics: Option<PrometheusHandle>,
    pub traffic: Arc<Traffic>,
    /// Whether the read model has been where the log ended since the start.
    pub caught_up: AtomicBool,
    /// Turns true when the server is about to stop, so that event streams end.
    pub stopping: watch::Receiver<bool>,
    /// Turns true [`LAST_PIECES`] later: what has come of an upload in pieces is to be noted and answered.
    pub last_pieces: watch::Receiver<bool>,
}

/// Serves `app` on `listener` until it is stopped; signals are the caller's business.
///
/// # Errors
/// The listener cannot be used.
pub fn serve(app: Arc<App>, listener: TcpListener) -> std::io::Result<Server> {
    let stalled_after = app.stalled_after;
    let data = web::Data::from(app);
    let table = web::Data::new(Routes::new(routes::all_paths()));
    let server = HttpServer::new(move || {
        let clock = data.system.clock.clone();
        let fresh_ids = FreshIds(Arc::new(move || clock.fresh_id().to_string()));
        ActixApp::new()
            .app_data(data.clone())
            .app_data(table.clone())
            .app_data(web::Data::new(fresh_ids))
            .wrap(from_fn(gate))
            .wrap(cors(&data.allowed_origins))
            .wrap(from_fn(edge))
            .configure(routes::configure)
            .service(
                web::resource("/.well-known/jwks.json")
                    .route(web::get().to(health::development_keys))
                    .default_service(only("GET")),
            )
            .default_service(web::to(unmatched))
    });
    let server = server
        .workers(std::thread::available_parallelism().map_or(2, usize::from))
        .shutdown_timeout(STOP_WITHIN.as_secs())
        .disable_signals()
        // Who hangs up is gone: else a stream would be kept for nobody until it has something to
        // write, and count against its user, and a job be leased to a worker that has left.
        .h1_allow_half_closed(false)
        .on_connect(move |connection, _| cut_when_stalled(connection, stalled_after))
        .listen(listener)?;
    Ok(server.run())
}

/// Lets the kernel end the connection once its client has taken none of what waits to be sent for
/// `after`. Until then no more is buffered for it than fits the socket and one buffer of actix's,
/// which asks a body for its next bytes only when there is room.
fn cut_when_stalled(connection: &dyn Any, after: Duration) {
    #[cfg(target_os = "linux")]
    if let Some(stream) = connection.downcast_ref::<actix_web::rt::net::TcpStream>() {
        let after_ms = u32::try_from(after.as_millis()).unwrap_or(u32::MAX);
        if let Err(error) = rustix::net::sockopt::set_tcp_user_timeout(stream, after_ms) {
            tracing::warn!(%error, "a connection has no limit for a client that reads nothing");
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (connection, after);
}

/// Preflights are answered before anyone is authenticated, and refusals carry the headers too, so
/// that a browser lets the page read them.
fn cors(origins: &[String]) -> Cors {
    let mut cors = Cors::default()
        .allowed_methods([
            Method::GET,
            Method::HEAD,
            Method::POST,
            Method::PUT,
            Method::PATCH,
            Method::DELETE,
            Method::OPTIONS,
        ])
        .allowed_headers([
            header::AUTHORIZATION,
            header::CONTENT_TYPE,
            header::ACCEPT,
            header::RANGE,
            header::IF_RANGE,
            header::IF_MATCH,
            header::IF_NONE_MATCH,
            header::HeaderName::from_static("idempotency-key"),
            header::HeaderName::from_static("x-request-id"),
            header::HeaderName::from_static("x-log-position"),
            header::HeaderName::from_static("last-event-id"),
            header::HeaderName::from_static("x-dev-user"),
        ])
        .allowed_headers(tus::REQUEST_HEADERS)
        .expose_headers([
            "X-Log-Position",
            "X-Request-Id",
            "X-Token-Refresh",
            "X-Dev-Mode",
            "Idempotent-Replayed",
            "X-RateLimit-Limit",
            "X-RateLimit-Remaining",
            "X-RateLimit-Reset",
            "Retry-After",
            "Content-Range",
            "Accept-Ranges",
            "ETag",
            "Content-Disposition",
            "Location",
        ])
        .expose_headers(tus::RESPONSE_HEADERS)
        .max_age(3600);
    for origin in origins {
        cors = cors.allowed_origin(origin);
    }
    cors
}
