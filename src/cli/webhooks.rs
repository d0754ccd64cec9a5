//! `t2m webhooks dead`: deliveries that could not be used. They can be listed and discarded beside a
//! running server; to retry one is to deliver it anew to that server, which alone writes the log.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use reqwest::Client;
use serde_json::{Value, json};

use super::{BadConfiguration, owner, say};
use crate::actors::dead_letters::{DeadLetters, Heading, Letter};
use crate::clerk::webhook::{WebhookVerifier, sign};
use crate::clock::Clock;
use crate::config::BlobStore;
use crate::media::blobs::{self, Blobs};

#[derive(Subcommand)]
pub enum Webhooks {
    /// Deliveries that were genuine but could not be used
    #[command(args_conflicts_with_subcommands = true)]
    Dead {
        #[command(subcommand)]
        action: Option<Action>,
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Subcommand)]
pub enum Action {
    /// Print one with its body
    Show {
        /// The message id
        #[arg(value_name = "ID")]
        id: String,
        #[command(flatten)]
        place: Place,
    },
    /// Deliver one, or all, to the running server again, signed anew
    Retry(Retry),
    /// Forget one, or all
    Discard {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Args)]
pub struct Place {
    /// Where they lie, the same as the server's
    #[arg(long, env = "T2M_DATA_DIR", default_value = "./data")]
    data_dir: PathBuf,
    /// The store of files, the same as the server's
    #[arg(long, env = "T2M_BLOBS", default_value = "file")]
    blobs: String,
    /// JSON instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
pub struct Which {
    /// The message id
    #[arg(value_name = "ID")]
    id: Option<String>,
    #[arg(long)]
    all: bool,
}

#[derive(Args)]
pub struct Retry {
    #[command(flatten)]
    which: Which,
    /// The running server [default: PUBLIC_URL, else T2M_LISTEN]
    #[arg(long, value_name = "URL")]
    server: Option<String>,
    /// As the server's; the first of several signs
    #[arg(long, env = "CLERK_WEBHOOK_SECRET", hide_env_values = true)]
    clerk_webhook_secret: Option<String>,
    #[arg(long, env = "PUBLIC_URL", hide = true)]
    public_url: Option<String>,
    #[arg(long, env = "T2M_LISTEN", default_value = "127.0.0.1:8080", hide = true)]
    listen: SocketAddr,
    #[command(flatten)]
    place: Place,
}

/// Letters read at once.
const PAGE: usize = 200;
/// The longest that one delivery may take; Clerk itself waits 15 seconds.
const PATIENCE: Duration = Duration::from_secs(15);

impl Webhooks {
    pub fn run(self) -> anyhow::Result<()> {
        let Self::Dead { action, place } = self;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            match action {
                None => list(&place).await,
                Some(Action::Show { id, place }) => show(&id, &place).await,
                Some(Action::Retry(retry)) => retry.run().await,
                Some(Action::Discard { which, place }) => discard(&which, &place).await,
            }
        })
    }
}

impl Place {
    /// To look only, which makes nothing.
    fn open_for_reading(&self) -> anyhow::Result<DeadLetters> {
        self.opened(Blobs::open_for_reading)
    }

    fn open(&self) -> anyhow::Result<DeadLetters> {
        self.opened(Blobs::open)
    }

    fn opened(
        &self,
        open: fn(&BlobStore, &Path) -> Result<Blobs, blobs::Error>,
    ) -> anyhow::Result<DeadLetters> {
        let store = BlobStore::parse(&self.blobs)
            .map_err(|fault| BadConfiguration(vec![format!("T2M_BLOBS: {fault}")]))?;
        ensure!(
            store != BlobStore::File || self.data_dir.is_dir(),
            "there is no data directory {}",
            self.data_dir.display()
        );
        let blobs = open(&store, &self.data_dir);
        let blobs = blobs.with_context(|| format!("opening {}", self.data_dir.display()))?;
        Ok(DeadLetters::new(&blobs))
    }
}

impl Which {
    /// Oldest first, the order in which they came.
    async fn letters(&self, letters: &DeadLetters) -> anyhow::Result<Vec<Heading>> {
        match &self.id {
            Some(id) => Ok(vec![found(letters, id).await?.heading]),
            None => {
                let mut all = all(letters).await?;
                all.reverse();
                Ok(all)
            }
        }
    }
}

async fn all(letters: &DeadLetters) -> anyhow::Result<Vec<Heading>> {
    let (mut all, mut after) = (vec![], None);
    loop {
        let (page, end) = letters.page(after.as_ref(), PAGE).await?;
        all.extend(page);
        match end {
            Some(end) => after = Some(end),
            None => return Ok(all),
        }
    }
}

async fn found(letters: &DeadLetters, id: &str) -> anyhow::Result<Letter> {
    letters.find(id).await?.with_context(|| format!("there is no dead letter {id}"))
}

async fn list(place: &Place) -> anyhow::Result<()> {
    let letters = all(&place.open_for_reading()?).await?;
    if letters.is_empty() {
        eprintln!("no dead letters in {}", place.data_dir.display());
    }
    for heading in letters {
        if place.json {
            say(format_args!("{}", serde_json::to_string(&heading)?));
        } else {
            let Heading { message_id, received_at, kind, reason } = heading;
            let received = received_at.format("%Y-%m-%dT%H:%M:%S%.3fZ");
            let kind = kind.unwrap_or_else(|| "-".to_owned());
            say(format_args!("{message_id}  {received}  {kind}  {reason}"));
        }
    }
    Ok(())
}

async fn show(id: &str, place: &Place) -> anyhow::Result<()> {
    let letter = found(&place.open_for_reading()?, id).await?;
    if place.json {
        say(format_args!("{}", serde_json::to_string(&letter)?));
        return Ok(());
    }
    let Letter { heading: Heading { message_id, received_at, kind, reason }, body } = letter;
    say(format_args!("message   {message_id}"));
    say(format_args!("received  {received_at}"));
    say(format_args!("type      {}", kind.unwrap_or_else(|| "-".to_owned())));
    say(format_args!("reason    {reason}\n\n{}", harmless(&body)));
    Ok(())
}

/// A body that is no JSON may hold signs that command a terminal.
fn harmless(body: &str) -> String {
    let commands = |sign: char| sign.is_control() && !matches!(sign, '\n' | '\t');
    let escaped = |sign: char| sign.escape_default().to_string();
    body.chars().map(|sign| if commands(sign) { escaped(sign) } else { sign.into() }).collect()
}

async fn discard(which: &Which, place: &Place) -> anyhow::Result<()> {
    owner::refuse_root(&place.data_dir)?;
    let chosen = which.letters(&place.open_for_reading()?).await?;
    if !chosen.is_empty() {
        let letters = place.open()?;
        for heading in &chosen {
            letters.discard(&heading.message_id).await?;
        }
    }
    match place.json {
        true => say(format_args!("{}", json!({ "discarded": chosen.len() }))),
        false => say(format_args!("discarded {}", chosen.len())),
    }
    Ok(())
}

impl Retry {
    async fn run(self) -> anyhow::Result<()> {
        owner::refuse_root(&self.place.data_dir)?;
        let secret = self.secret()?;
        let server = self.server()?;
        let chosen = self.which.letters(&self.place.open_for_reading()?).await?;
        if chosen.is_empty() {
            return Ok(());
        }
        let letters = self.place.open()?;
        let client = Client::builder().timeout(PATIENCE).build()?;
        let (mut done, mut unusable) = (0, 0);
        for heading in chosen {
            let id = heading.message_id;
            // One that was settled meanwhile needs nothing.
            let Some(letter) = letters.find(&id).await? else { continue };
            let outcome = deliver(&client, &server, &secret, &letter).await?;
            match self.place.json {
                true => say(format_args!("{}", json!({ "message_id": id, "outcome": outcome }))),
                false => say(format_args!("{id}  {outcome}")),
            }
            if outcome == "unusable" {
                unusable += 1;
            } else {
                letters.discard(&id).await?;
                done += 1;
            }
        }
        ensure!(unusable == 0, "{unusable} of {} are still unusable", done + unusable);
        Ok(())
    }

    fn secret(&self) -> Result<String, BadConfiguration> {
        let given = |text: &String| !text.trim().is_empty();
        let secrets = self.clerk_webhook_secret.clone().filter(given);
        let secrets =
            secrets.or_else(|| std::env::var("CLERK_WEBHOOK_SIGNING_SECRET").ok().filter(given));
        let bad = |fault: &str| BadConfiguration(vec![format!("CLERK_WEBHOOK_SECRET: {fault}")]);
        let secrets = secrets.ok_or_else(|| bad("required, to sign the delivery"))?;
        WebhookVerifier::parse(&secrets).map_err(|fault| bad(&fault))?;
        Ok(secrets.split(',').next().unwrap_or_default().trim().to_owned())
    }

    /// Without a trailing slash.
    fn server(&self) -> Result<String, BadConfiguration> {
        let bad = |fault: &str| BadConfiguration(vec![fault.to_owned()]);
        let named = [("--server", &self.server), ("PUBLIC_URL", &self.public_url)];
        for (name, url) in named {
            let Some(url) = url.as_deref().filter(|url| !url.is_empty()) else { continue };
            let parsed = url::Url::parse(url).ok();
            if !parsed.is_some_and(|url| matches!(url.scheme(), "http" | "https")) {
                return Err(bad(&format!("{name}: not an http or https URL")));
            }
            return Ok(url.trim_end_matches('/').to_owned());
        }
        let mut address = self.listen;
        if address.port() == 0 {
            return Err(bad("T2M_LISTEN: names no port; say where the server is by --server URL"));
        }
        if address.ip().is_unspecified() {
            address.set_ip(IpAddr::V4(Ipv4Addr::LOCALHOST));
        }
        Ok(format!("http://{address}"))
    }
}

/// What became of it, as the server says.
async fn deliver(
    client: &Client,
    server: &str,
    secret: &str,
    letter: &Letter,
) -> anyhow::Result<String> {
    let id = &letter.heading.message_id;
    let at = Clock::system().now().timestamp();
    let signature = sign(secret, id, at, letter.body.as_bytes()).map_err(anyhow::Error::msg)?;
    let request = client
        .post(format!("{server}/api/v1/webhooks/clerk"))
        .header("svix-id", id)
        .header("svix-timestamp", at)
        .header("svix-signature", signature)
        .header("content-type", "application/json")
        .body(letter.body.clone());
    let response = match request.send().await {
        Err(error) if error.is_connect() => {
            bail!("no server answers at {server}: start it, or name it by --server URL")
        }
        sent => sent.with_context(|| format!("delivering {id} to {server}"))?,
    };
    let status = response.status();
    let body: Value = response.json().await.unwrap_or_default();
    match body["data"]["outcome"].as_str() {
        Some(outcome) if status.is_success() => Ok(outcome.to_owned()),
        _ => bail!("{server} refused {id}: {status} {}", body["message"].as_str().unwrap_or("")),
    }
}
