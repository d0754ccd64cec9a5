//! `t2m demo`: the main job from a webhook to a playable video, over HTTP as a client would, and
//! the proof that the log alone gives the same read model again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::{Args, CommandFactory, FromArgMatches, Parser};
use futures_util::StreamExt;
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::{Client, RequestBuilder, multipart};
use serde_json::{Value, json};

use super::assemble::{Assembled, assemble, check, random_secret};
use super::interrupt::Interrupt;
use super::replay::replay;
use super::{arguments, say};
use crate::actors::System;
use crate::clerk::{signing::SigningKey, webhook};
use crate::clock::Clock;
use crate::config::Options;

#[derive(Args)]
pub struct Demo {
    /// Where `video.mp4`, its poster and captions go
    #[arg(long, value_name = "DIR", default_value = "./demo-out")]
    out: PathBuf,
    /// What the video shall show
    #[arg(
        long,
        default_value = "A lighthouse above a quiet sea at dusk. Stars come out one by one. Somewhere far away, a ship answers."
    )]
    prompt: String,
    /// Seconds
    #[arg(long, default_value_t = 8)]
    duration: u32,
    #[arg(long, default_value = "720p")]
    quality: String,
    #[arg(long, default_value = "16:9")]
    aspect_ratio: String,
}

const ISSUER: &str = "https://demo.t2m.localhost";
const USER: &str = "user_demo";
const SESSION: &str = "sess_demo";
/// The longest the whole render may take.
const PATIENCE: Duration = Duration::from_secs(600);

impl Demo {
    pub fn run(self) -> anyhow::Result<()> {
        let data = ScratchDir::new()?;
        actix::System::new().block_on(async { Interrupt::listen()?.or(self.perform(&data)).await })
    }

    async fn perform(self, data: &ScratchDir) -> anyhow::Result<()> {
        std::fs::create_dir_all(&self.out)
            .with_context(|| format!("making {}", self.out.display()))?;
        let key = SigningKey::generate("demo")?;
        let secret = format!("whsec_{}", random_secret());
        let options = options([
            "t2m".into(),
            "--listen=127.0.0.1:0".into(),
            format!("--data-dir={}", data.0.display()),
            format!("--clerk-jwt-key={}", key.public_pem()?),
            format!("--clerk-issuer={ISSUER}"),
            format!("--clerk-webhook-secret={secret}"),
        ])?;
        let Assembled { system, server, address, stopping, held: _held, .. } =
            assemble(check(options)?, Clock::system()).await?;
        let handle = server.handle();
        actix::spawn(server);
        say(format_args!("1  server      {address} (throw-away keys, embedded log)"));

        let client =
            Visitor { http: Client::new(), address, key, secret, clock: system.clock.clone() };
        client.deliver("user.created", &user_body()).await?;
        client.deliver("session.created", &session_body(&client.clock)).await?;
        let me = client.get("me").await?;
        ensure!(me["user"]["email"] == "ada@example.com", "the webhook's user is not the caller's");
        say(format_args!(
            "2  webhooks    user.created and session.created, signed; {} signed in",
            me["user"]["email"]
        ));

        let file = client.upload().await?;
        say(format_args!(
            "3  upload      {} ({} bytes, sha256 {:.16}…)",
            file["filename"],
            file["size"],
            file["sha256"].as_str().unwrap_or_default()
        ));

        let job = client.generate(&self, &file).await?;
        let job_id = job["job_id"].as_str().context("the answer names no job")?.to_owned();
        say(format_args!("4  generate    job {job_id}"));
        client.watch(&job_id).await?;
        let job = client.get(&format!("jobs/{job_id}")).await?;
        ensure!(
            job["status"] == "completed",
            "the job ended as {}: {}",
            job["state"],
            job["error"]
        );
        let output = &job["output"];
        say(format_args!(
            "5  render      {}x{}, {} s, {} bytes",
            output["width"], output["height"], output["duration"], output["size"]
        ));

        for (name, file_id) in
            [("poster.jpg", "poster_file_id"), ("captions.vtt", "captions_file_id")]
        {
            let id = output[file_id].as_str().with_context(|| format!("no {file_id}"))?;
            let bytes = client.fetch(&format!("files/{id}/signed-url")).await?;
            std::fs::write(self.out.join(name), bytes)
                .with_context(|| format!("writing {name}"))?;
        }
        let bytes = client.fetch(&format!("videos/{job_id}/signed-url")).await?;
        ensure!(Some(bytes.len() as u64) == output["size"].as_u64(), "the link gave another size");
        let video = self.out.join("video.mp4");
        std::fs::write(&video, bytes).with_context(|| format!("writing {}", video.display()))?;
        say(format_args!("6  signed url  {}", video.display()));

        prove_replay(&system, data).await?;
        stopping.send_replace(true);
        handle.stop(true).await;
        say(format_args!("\nPlay it: {}", video.display()));
        Ok(())
    }
}

/// Builds the read model anew from the log and compares it with the one that answered.
async fn prove_replay(system: &Arc<System>, data: &ScratchDir) -> anyhow::Result<()> {
    // Nothing is left to happen: the job is done, so the head stands still.
    let head = *system.log.head().borrow();
    system.visible(head).await.context("waiting for the read model")?;
    let verified = system.log.verify().await.context("verifying the log")?;
    let fresh = {
        let (log, keyring) = (Arc::clone(&system.log), system.keyring.clone());
        replay(log, keyring, &data.0.join("replayed.sqlite"), head).await?
    };
    let (live, replayed) = (system.views.content_hash()?, fresh.content_hash()?);
    ensure!(live == replayed, "the replayed read model differs: {live} live, {replayed} replayed");
    say(format_args!(
        "7  replay      {} events, chain intact; read model {live:.16}… live and replayed alike",
        verified.events
    ));
    Ok(())
}

/// The front end and Clerk, as the server sees them.
struct Visitor {
    http: Client,
    address: String,
    key: SigningKey,
    secret: String,
    clock: Clock,
}

impl Visitor {
    fn url(&self, path: &str) -> String {
        format!("{}/api/v1/{path}", self.address)
    }

    /// A session token as Clerk makes them: a minute long, renewed for each request.
    fn token(&self) -> anyhow::Result<String> {
        let now = self.clock.now().timestamp();
        Ok(self.key.sign(&json!({
            "iss": ISSUER, "aud": "t2m-api", "sub": USER, "sid": SESSION,
            "iat": now, "nbf": now, "exp": now + 60,
        }))?)
    }

    async fn deliver(&self, kind: &str, data: &Value) -> anyhow::Result<()> {
        let now = self.clock.now();
        let body = json!({
            "type": kind, "object": "event", "timestamp": now.timestamp_millis(), "data": data,
        });
        let body = body.to_string();
        let id = format!("msg_{}", self.clock.fresh_id().simple());
        let signature = webhook::sign(&self.secret, &id, now.timestamp(), body.as_bytes());
        let request = self
            .http
            .post(self.url("webhooks/clerk"))
            .header("svix-id", id)
            .header("svix-timestamp", now.timestamp())
            .header("svix-signature", signature.map_err(anyhow::Error::msg)?)
            .header("content-type", "application/json")
            .body(body);
        answer(request).await.with_context(|| format!("delivering {kind}"))?;
        Ok(())
    }

    async fn get(&self, path: &str) -> anyhow::Result<Value> {
        answer(self.http.get(self.url(path)).bearer_auth(self.token()?)).await
    }

    async fn upload(&self) -> anyhow::Result<Value> {
        let notes = "A note that came with the prompt.\n";
        let part = multipart::Part::text(notes).file_name("notes.txt").mime_str("text/plain")?;
        let form = multipart::Form::new().part("file", part).text("purpose", "demo");
        let request = self.http.post(self.url("files/upload")).bearer_auth(self.token()?);
        answer(request.multipart(form)).await.context("uploading a file")
    }

    async fn generate(&self, demo: &Demo, file: &Value) -> anyhow::Result<Value> {
        let body = json!({
            "prompt": demo.prompt, "duration": demo.duration, "quality": demo.quality,
            "aspect_ratio": demo.aspect_ratio, "source_file_id": file["file_id"],
        });
        let request = self.http.post(self.url("videos/generate")).bearer_auth(self.token()?);
        answer(request.json(&body)).await.context("asking for a video")
    }

    /// Follows the server's own event stream until the job is over.
    async fn watch(&self, job_id: &str) -> anyhow::Result<()> {
        let style = ProgressStyle::with_template("   {bar:40.cyan/blue} {pos:>3} %  {msg}")?;
        let bar = ProgressBar::new(100).with_style(style);
        let request = self.http.get(self.url(&format!("jobs/{job_id}/events")));
        let response = request.bearer_auth(self.token()?).send().await?.error_for_status()?;
        let mut bytes = response.bytes_stream();
        let mut buffer = String::new();
        let follow = async {
            while let Some(chunk) = bytes.next().await {
                buffer.push_str(&String::from_utf8_lossy(&chunk?));
                while let Some(end) = buffer.find("\n\n") {
                    let frame: String = buffer.drain(..end + 2).collect();
                    let Some(data) = frame.lines().find_map(|line| line.strip_prefix("data: "))
                    else {
                        continue;
                    };
                    let event: Value = serde_json::from_str(data)?;
                    let state = event["state"].as_str().unwrap_or_default().to_owned();
                    bar.set_position(event["progress"].as_u64().unwrap_or_default());
                    bar.set_message(state.clone());
                    if matches!(state.as_str(), "completed" | "failed" | "cancelled") {
                        return anyhow::Ok(());
                    }
                }
            }
            anyhow::bail!("the event stream ended before the job")
        };
        let followed = tokio::time::timeout(PATIENCE, follow).await;
        bar.finish();
        followed.context("the render took too long")?
    }

    /// Asks for a link and follows it, as a player does: without any token.
    async fn fetch(&self, path: &str) -> anyhow::Result<bytes::Bytes> {
        let request = self.http.post(self.url(path)).bearer_auth(self.token()?);
        let link = answer(request.json(&json!({ "expiresIn": 60 }))).await?;
        let url = link["url"].as_str().context("the answer has no url")?;
        Ok(self.http.get(url).send().await?.error_for_status()?.bytes().await?)
    }
}

/// The `data` of a success; anything else is an error with what the server said.
async fn answer(request: RequestBuilder) -> anyhow::Result<Value> {
    let response = request.send().await?;
    let status = response.status();
    let mut body: Value = response.json().await?;
    ensure!(status.is_success() && body["success"] == true, "{status}: {}", body["message"]);
    Ok(body["data"].take())
}

fn user_body() -> Value {
    json!({
        "id": USER, "object": "user", "first_name": "Ada", "last_name": "Lovelace",
        "primary_email_address_id": "idn_demo",
        "email_addresses": [{ "id": "idn_demo", "email_address": "ada@example.com" }],
        "public_metadata": { "role": "creator", "subscription_tier": "premium" },
        "created_at": 1_767_225_600_000_u64, "updated_at": 1_767_225_600_000_u64,
    })
}

fn session_body(clock: &Clock) -> Value {
    let now = clock.now().timestamp_millis();
    json!({
        "id": SESSION, "object": "session", "user_id": USER, "status": "active",
        "created_at": now, "updated_at": now, "expire_at": now + 7 * 24 * 3_600_000,
    })
}

#[derive(Parser)]
struct OwnOptions {
    #[command(flatten)]
    options: Options,
}

/// These, and the defaults of all others: neither the environment nor `.env` changes the demo.
fn options<const N: usize>(given: [String; N]) -> Result<Options, clap::Error> {
    let command = arguments::without(OwnOptions::command(), &|_| true);
    let mut found = command.try_get_matches_from(given)?;
    Ok(OwnOptions::from_arg_matches_mut(&mut found)?.options)
}

/// The demo's data directory, gone when it ends.
struct ScratchDir(PathBuf);

impl ScratchDir {
    fn new() -> anyhow::Result<Self> {
        let name = format!("t2m-demo-{}", Clock::system().fresh_id().simple());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_option_of_the_demo_is_read_from_the_environment() {
        let command = arguments::without(OwnOptions::command(), &|_| true);
        let mut read = command.get_arguments().filter_map(clap::Arg::get_env);
        assert_eq!(read.next(), None);
        let options = options(["t2m".to_owned(), "--listen=127.0.0.1:1".to_owned()]).unwrap();
        assert_eq!((options.listen.port(), options.max_upload_bytes), (1, 2 << 30));
        assert!(options.master_key.is_none());
    }
}
