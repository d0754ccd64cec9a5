//! Puts the parts together: from checked settings to a server that is ready to run.

use std::fs::File;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use actix_web::dev::Server;
use anyhow::Context;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::watch;

use super::door::Door;
use super::log::Which;
use super::read_model::open_views;
use super::{BadConfiguration, agreed, layout, restore, server_lock};
use crate::actors::callbacks::Callbacks;
use crate::actors::callbacks::sender::Sender;
use crate::actors::dead_letters::DeadLetters;
use crate::actors::dispatcher::{self, Rendering};
use crate::actors::erasure::Eraser;
use crate::actors::keyring::Keyring;
use crate::actors::leasing::Leasing;
use crate::actors::rebuild::{self, Rebuilds};
use crate::actors::secrets::{SECRETS, Secrets};
use crate::actors::storekeeper::Storekeeper;
use crate::actors::supervise::supervise;
use crate::actors::{System, callbacks, metadata_sync, renewal, timekeeper};
use crate::clerk::api::{self, Api};
use crate::clerk::jwks::Jwks;
use crate::clerk::jwt::{KeySet, Rules};
use crate::clerk::signing::SigningKey;
use crate::clerk::webhook::WebhookVerifier;
use crate::clerk::{Authenticator, Keys};
use crate::clock::Clock;
use crate::config::{
    self, BlobStore, EngineLimits, Environment, Options, Secret, Settings, TokenKeys,
};
use crate::domain::job::Kind;
use crate::domain::tier::Caps;
use crate::http::address::TrustedProxies;
use crate::http::app::{self, App};
use crate::http::jobs::Shown;
use crate::http::quota::Quotas;
use crate::http::rates::{Budget, Budgets, Rates};
use crate::http::traffic::Traffic;
use crate::http::worker::WorkerTokens;
use crate::log;
use crate::media::blobs::Blobs;
use crate::media::renderer::Engine;
use crate::media::renderer::command::{CommandEngine, Limits};
use crate::media::reservations::Reservations;
use crate::media::signed_url::SigningSecrets;
use crate::media::uploads::Uploads;
use crate::media::vault::{MasterKey, Vault};
use crate::telemetry;

/// The log that is one machine's.
const EMBEDDED: &str = "embedded";
/// Events that are followed within a moment.
const WORTH_BUILDING: u64 = 10_000;
/// Key id of the development key.
const DEVELOPMENT_KID: &str = "t2m-development";

/// Settings whose keys and secrets have been parsed.
pub struct Ready {
    pub settings: Settings,
    keys: ParsedKeys,
    webhooks: Option<WebhookVerifier>,
    rates: Rates,
    proxies: TrustedProxies,
    caps: Caps,
    master_key: Option<MasterKey>,
}

enum ParsedKeys {
    Fixed(Arc<KeySet>),
    Jwks(String),
    Development,
}

/// Checks everything that can be checked before anything is started.
///
/// # Errors
/// [`BadConfiguration`] with every fault at once.
pub fn check(options: Options) -> Result<Ready, BadConfiguration> {
    let (settings, mut faults) = options.check();
    // Its sentences name the setting.
    faults.extend(log::check(&settings.log).err().map(|fault| fault.to_string()));
    let mut noted = |variable: &str, fault: String| faults.push(format!("{variable}: {fault}"));
    let keys = match &settings.token_keys {
        TokenKeys::Pem(pem) => KeySet::from_pem(pem)
            .map(|keys| ParsedKeys::Fixed(Arc::new(keys)))
            .map_err(|fault| noted("CLERK_JWT_KEY", fault))
            .ok(),
        TokenKeys::Jwks(url) => Some(ParsedKeys::Jwks(url.clone())),
        TokenKeys::Development => Some(ParsedKeys::Development),
    };
    let webhooks = settings.webhook_secrets.as_deref().and_then(|secrets| {
        WebhookVerifier::parse(secrets).map_err(|fault| noted("CLERK_WEBHOOK_SECRET", fault)).ok()
    });
    if let Some(secrets) = &settings.signing_secrets
        && let Err(fault) = SigningSecrets::parse(secrets)
    {
        noted("FILE_SIGNING_SECRET", fault.to_string());
    }
    if let Some(secrets) = &settings.callbacks.signing_secrets
        && let Err(fault) = WebhookVerifier::parse(secrets.reveal())
    {
        noted("CALLBACK_SIGNING_SECRET", fault);
    }
    let proxies = settings.trusted_proxies.parse::<TrustedProxies>();
    let proxies = proxies.map_err(|fault| noted("T2M_TRUSTED_PROXIES", fault.to_string())).ok();
    let caps = settings.running_per_user.parse::<Caps>();
    let caps = caps.map_err(|fault| noted("T2M_RUNNING_PER_USER", fault.to_string())).ok();
    let master_key = settings.master_key.as_ref().and_then(|key| {
        MasterKey::parse(key.reveal())
            .map_err(|fault| noted("T2M_MASTER_KEY", fault.to_string()))
            .ok()
    });
    match (keys, budgets(&settings, noted), proxies, caps) {
        (Some(keys), Some(budgets), Some(proxies), Some(caps)) if faults.is_empty() => {
            let rates = Rates::new(budgets);
            Ok(Ready { settings, keys, webhooks, rates, proxies, caps, master_key })
        }
        _ => Err(BadConfiguration(faults)),
    }
}

/// What is made here must then be the same at the others.
fn may_be_one_of_several(settings: &Settings) -> bool {
    settings.log != EMBEDDED && settings.blobs != BlobStore::File
}

/// Notes each that is none.
fn budgets(settings: &Settings, mut noted: impl FnMut(&str, String)) -> Option<Budgets> {
    let mut budget = |variable: &str, text: &str| {
        text.parse::<Budget>().map_err(|fault| noted(variable, fault.to_string())).ok()
    };
    let writes = budget("RATE_LIMIT_WRITES", &settings.rate_limit_writes);
    let reads = budget("RATE_LIMIT_READS", &settings.rate_limit_reads);
    let links = budget("RATE_LIMIT_LINKS", &settings.rate_limit_links);
    let anonymous = budget("RATE_LIMIT_ANONYMOUS", &settings.rate_limit_anonymous);
    Some(Budgets { writes: writes?, reads: reads?, links: links?, anonymous: anonymous? })
}

/// A server that answers once it is awaited.
pub struct Assembled {
    pub system: Arc<System>,
    pub server: Server,
    /// `http://127.0.0.1:8080`, the real port included.
    pub address: String,
    /// Where it listens.
    pub door: Door,
    /// What it is being asked.
    pub traffic: Arc<Traffic>,
    /// Say true before the server stops, so that event streams end and engines give back their jobs.
    pub stopping: watch::Sender<bool>,
    /// The same once pieces of uploads must be answered.
    pub last_pieces: watch::Sender<bool>,
    pub dispatchers: Vec<dispatcher::Ended>,
    /// The data directory is this server's until it is dropped.
    pub held: File,
}

/// Opens log, views and blobs, starts the actors and binds the address.
///
/// # Errors
/// What could not be opened, with its name.
pub async fn assemble(ready: Ready, clock: Clock) -> anyhow::Result<Assembled> {
    let Ready { settings, keys, webhooks, rates, proxies, caps, master_key } = ready;
    // Before anything is counted: the actors do so at once, of what time has brought about meanwhile.
    let metrics = metrics_of_this_process();
    let data_dir = &settings.data_dir;
    std::fs::create_dir_all(data_dir)
        .with_context(|| format!("making the data directory {}", data_dir.display()))?;
    restore::refuse_unfinished(data_dir)?;
    let listener = TcpListener::bind(settings.listen)
        .with_context(|| format!("listening on {}", settings.listen))?;
    let address = format!("http://{}", listener.local_addr().context("reading the address")?);
    let door = Door::of(&listener).context("holding the listening socket")?;

    let which = Which { data_dir: data_dir.clone(), setting: settings.log.clone() };
    which.ensure_no_loss_before_opening().await?;
    let log = log::open(&settings.log, data_dir).await.context("opening the log")?;
    let held = server_lock::take_for_server(data_dir)?.with_context(|| {
        format!("another server, or a command, is at work in {}", data_dir.display())
    })?;
    let views = open_views(&*log, &which).await?;
    let head = *log.head().borrow();
    let blobs = Blobs::open(&settings.blobs, data_dir).context("opening the blob store")?;
    blobs.probe().await.context("looking into the blob store")?;
    let blobs = Arc::new(blobs);
    blobs.sweep_incoming().context("clearing unfinished uploads")?;
    blobs.sweep_documents().context("clearing unfinished documents")?;
    let reservations = Reservations::default();
    let uploads = Uploads::open(&blobs, &reservations).context("reading unfinished uploads")?;
    let uploads = Arc::new(uploads);

    let of_several = may_be_one_of_several(&settings);
    let master = match master_key {
        Some(given) => given,
        None => {
            let path = data_dir.join(layout::MASTER_KEY);
            if of_several {
                agreed::on_master_key(&blobs, &path).await?;
            }
            MasterKey::kept_in(&path)
        }
    };
    let keyring = Keyring::new(&blobs, master.clone());
    anyhow::ensure!(
        keyring.is_ours(of_several).await.context("looking at the keys of users")?,
        "T2M_MASTER_KEY: the keys in the store were sealed by another master key; give every node \
         the same, or restore the one of this data directory (master.key)"
    );
    if views.checkpoint() == 0 && head >= WORTH_BUILDING {
        tracing::info!(events = head, "a new read model is built from the whole log");
        if let Err(error) = rebuild::fill(Arc::clone(&log), keyring.clone(), &views, head).await {
            tracing::warn!(%error, "it is to follow the log from the start instead");
        }
    }
    let system = System::start(clock.clone(), log, views, keyring);
    // What was written before the last stop shows before the first request is taken. Where that
    // cannot be, requests are better answered without it than not at all, and readiness says no.
    if !system.progress.reached_or_stuck(head).await {
        tracing::error!(head, "serving begins with a read model that stands still");
    }
    let rebuilds = Rebuilds::new(
        clock.clone(),
        Arc::clone(&system.log),
        system.keyring.clone(),
        system.views.clone(),
    );
    if !system.progress.now().parked.is_empty() {
        // A newer program may understand what this data was parked at.
        let _ = rebuilds.start(false, &[]).await;
    }
    timekeeper::start(Arc::clone(&system));
    let storekeeper = Storekeeper {
        system: Arc::clone(&system),
        blobs: Arc::clone(&blobs),
        uploads: Arc::clone(&uploads),
        retention: settings.retention,
    };
    storekeeper.start();
    let dead_letters = DeadLetters::new(&blobs);
    // Before the first delivery, which may be the one that settles a letter.
    if let Err(error) = dead_letters.trim(clock.now()).await {
        tracing::warn!(%error, "the dead letters could not be read");
    }
    dead_letters.start(clock.clone());
    Eraser::new(Arc::clone(&system), dead_letters.clone(), Arc::clone(&uploads)).start();
    renewal::start(Arc::clone(&system));
    let leasing = Leasing::new(Arc::clone(&system), &blobs, caps);
    let leasing = Arc::new(leasing);
    if let Err(error) = leasing.sweep().await {
        tracing::warn!(%error, "outputs of workers that died could not be cleared");
    }
    let secrets = Secrets::new(Vault::new(&blobs, SECRETS, master));
    secrets.clone().start(Arc::clone(&system));
    // An engine is told its paths, and runs somewhere else. What a crash left there is of use to
    // the next attempt.
    let place = std::path::absolute(data_dir).context("finding the data directory")?;
    let (stopping, stopped) = watch::channel(false);
    let (last_pieces, last) = watch::channel(false);
    let mut dispatchers = Vec::new();
    let engines =
        [(Kind::Video, &settings.engine), (Kind::Translation, &settings.translation_engine)];
    for (kind, engine) in engines {
        if let Some(engine) = engine_of(engine, settings.engine_limits) {
            let rendering = Rendering {
                engine,
                kind,
                leasing: Arc::clone(&leasing),
                blobs: Arc::clone(&blobs),
                secrets: secrets.clone(),
                scratch: dispatcher::scratch_of(kind, &place),
                slots: 1,
            };
            dispatchers.push(dispatcher::start(Arc::clone(&system), rendering, stopped.clone()));
        }
    }

    let links = match &settings.signing_secrets {
        Some(secrets) => SigningSecrets::parse(secrets)?,
        None => {
            let path = data_dir.join(layout::FILE_SIGNING_SECRET);
            if of_several {
                let fresh = || random_secret().into_bytes();
                agreed::on(&blobs, &path, "FILE_SIGNING_SECRET", fresh).await?;
            }
            SigningSecrets::parse(&kept_secret(&path, random_secret)?)?
        }
    };
    let public_url = settings.public_url.clone().unwrap_or_else(|| address.clone());
    let allowed_origins =
        settings.allowed_origins.clone().unwrap_or_else(|| vec![origin_of(&public_url)]);
    let callback_secrets = callback_secrets(&settings, &blobs).await?;
    let callbacks = Callbacks::new(
        &blobs,
        settings.callbacks.allow_private,
        callback_secrets.is_some(),
        settings.callbacks.delays.clone(),
    );
    if let Some(secrets) = callback_secrets {
        let shown = Shown::new(&system, &leasing, settings.retention);
        let delivery = callbacks::Delivery {
            system: Arc::clone(&system),
            callbacks: callbacks.clone(),
            sender: Sender::new(&secrets, settings.callbacks.allow_private)
                .context("preparing to send callbacks")?,
            show: Arc::new(move |row| shown.value(row)),
            path: data_dir.join(layout::CALLBACKS_POSITION),
        };
        callbacks::start(delivery, stopped.clone());
    }
    let development_keys = match settings.token_keys {
        TokenKeys::Development => Some(development_key(data_dir)?.jwks_json()),
        TokenKeys::Pem(_) | TokenKeys::Jwks(_) => None,
    };
    if let Some(backend) = &settings.backend {
        let api = Api::new(backend, api::unix_clock(&clock)).context("preparing to call Clerk")?;
        let checkpoint = data_dir.join(layout::CLERK_SYNC_POSITION);
        metadata_sync::start(Arc::clone(&system), Arc::new(api), checkpoint, stopped.clone());
    }
    let traffic = Arc::new(Traffic::default());
    let app = App {
        caught_up: AtomicBool::new(false),
        development_keys,
        system: Arc::clone(&system),
        log_engine: settings.log.split(':').next().unwrap_or_default().to_owned(),
        started_at: clock.now(),
        blobs,
        uploads,
        upload_lifetime: settings.upload_lifetime,
        quotas: Quotas::new(settings.quotas, reservations),
        retention: settings.retention,
        secrets,
        links,
        authenticator: authenticator(&settings, keys, &clock)?,
        webhooks,
        dead_letters,
        rebuilds,
        leasing,
        callbacks,
        worker_tokens: WorkerTokens::new(&settings.worker_tokens),
        rates,
        proxies,
        public_url,
        allowed_origins,
        max_upload_bytes: settings.max_upload_bytes,
        streams_per_user: usize::try_from(settings.streams_per_user).unwrap_or(usize::MAX),
        stalled_after: Duration::from_secs(u64::from(settings.stalled_s)),
        dev_mode: settings.dev_mode,
        require_onboarding: settings.require_onboarding,
        production: settings.environment == Environment::Production,
        metrics,
        traffic: Arc::clone(&traffic),
        stopping: stopped,
        last_pieces: last,
    };
    let server = app::serve(Arc::new(app), listener).context("starting the front end")?;
    Ok(Assembled {
        system,
        server,
        address,
        door,
        traffic,
        stopping,
        last_pieces,
        dispatchers,
        held,
    })
}

/// A second server in one process, as in a demo, counts nothing.
fn metrics_of_this_process() -> Option<PrometheusHandle> {
    let handle = telemetry::install().ok()?;
    let kept = handle.clone();
    actix::spawn(async move {
        loop {
            tokio::time::sleep(METRICS_UPKEEP).await;
            kept.run_upkeep();
        }
    });
    Some(handle)
}

/// How often what was measured is put into its buckets.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// The engine of a setting; none for remote workers alone.
pub fn engine_of(setting: &config::Engine, limits: EngineLimits) -> Option<Engine> {
    let EngineLimits { time, memory_bytes, output_bytes, scratch_bytes } = limits;
    match setting {
        config::Engine::Storyboard => {
            let threads = std::thread::available_parallelism().map_or(2, usize::from);
            Some(Engine::Storyboard { threads })
        }
        config::Engine::Command(words) => {
            let limits = Limits { time, memory_bytes, output_bytes, scratch_bytes };
            Some(Engine::Command(CommandEngine::new(words.clone(), limits)))
        }
        config::Engine::None => None,
    }
}

fn authenticator(
    settings: &Settings,
    keys: ParsedKeys,
    clock: &Clock,
) -> anyhow::Result<Authenticator> {
    let keys = match keys {
        ParsedKeys::Fixed(keys) => Keys::Fixed(keys),
        ParsedKeys::Development => {
            let pem = development_key(&settings.data_dir)?.public_pem()?;
            Keys::Fixed(Arc::new(KeySet::from_pem(&pem).map_err(anyhow::Error::msg)?))
        }
        ParsedKeys::Jwks(url) => {
            let clock = clock.clone();
            let jwks = Jwks::new(&url, Arc::new(move || clock.now().timestamp()))?;
            let jwks = Arc::new(jwks);
            let kept = Arc::clone(&jwks);
            tokio::spawn(supervise("jwks", move || Arc::clone(&kept).run(rand::random::<f64>)));
            Keys::Fetched(jwks)
        }
    };
    let rules = Rules {
        issuer: settings.issuer.clone(),
        audience: settings.audience.clone(),
        authorized_parties: settings.authorized_parties.clone(),
    };
    Ok(Authenticator::new(keys, rules))
}

/// The key that `t2m token` signs with; made at its first use.
pub fn development_key(data_dir: &Path) -> anyhow::Result<SigningKey> {
    let path = data_dir.join(layout::DEVELOPMENT_KEY);
    match std::fs::read_to_string(&path) {
        Ok(pem) => SigningKey::from_pkcs8_pem(DEVELOPMENT_KID, &pem)
            .with_context(|| format!("reading the development key {}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let key = SigningKey::generate(DEVELOPMENT_KID)?;
            keep_private(&path, key.to_pkcs8_pem()?.as_bytes())?;
            Ok(key)
        }
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// What signs callbacks: in production only what was given.
async fn callback_secrets(settings: &Settings, blobs: &Blobs) -> anyhow::Result<Option<Secret>> {
    if let Some(secrets) = &settings.callbacks.signing_secrets {
        return Ok(Some(secrets.clone()));
    }
    if settings.environment == Environment::Production {
        return Ok(None);
    }
    let path = settings.data_dir.join(layout::CALLBACK_SIGNING_SECRET);
    let fresh = || format!("whsec_{}", random_secret());
    if may_be_one_of_several(settings) {
        agreed::on(blobs, &path, "CALLBACK_SIGNING_SECRET", || fresh().into_bytes()).await?;
    }
    let secret = kept_secret(&path, fresh)?;
    WebhookVerifier::parse(&secret)
        .map_err(anyhow::Error::msg)
        .with_context(|| format!("reading {}", path.display()))?;
    Ok(Some(secret.into()))
}

/// A secret of development, made at its first use, so that what it signs outlives a restart.
fn kept_secret(path: &Path, make: impl FnOnce() -> String) -> anyhow::Result<String> {
    match std::fs::read_to_string(path) {
        Ok(secret) => Ok(secret.trim().to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let secret = make();
            keep_private(path, secret.as_bytes())?;
            Ok(secret)
        }
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// 256 random bits.
pub fn random_secret() -> String {
    STANDARD.encode(rand::random::<[u8; 32]>())
}

/// Writes a secret that only this user may read, and never half of it.
pub(super) fn keep_private(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let context = || format!("writing {}", path.display());
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).with_context(context)?;
    }
    let unfinished = path.with_extension("new");
    let mut options = std::fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&unfinished)
        .with_context(context)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).with_context(context)?;
    std::fs::rename(&unfinished, path).with_context(context)?;
    // Else a power cut could take it, and the next start would make another one.
    match path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        Some(above) => File::open(above).and_then(|it| it.sync_all()).with_context(context),
        None => Ok(()),
    }
}

/// Scheme, host and port of a URL, as browsers send it in `Origin`.
fn origin_of(url: &str) -> String {
    url::Url::parse(url).map_or_else(|_| url.to_owned(), |url| url.origin().ascii_serialization())
}
