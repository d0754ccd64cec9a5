//! Clients that go on whatever happens: a request that is not answered is made again at the next node,
//! under the same key, until it is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use reqwest::{Client, Method, RequestBuilder};
use serde_json::json;
use tokio::task::JoinHandle;

use super::{Cluster, text};
use crate::engine_faults::until;
use crate::server::{Answer, claims, signed, try_ask};

/// A command that was acknowledged, and what it must have led to.
pub struct Told {
    user: String,
    job: String,
    cancelled: bool,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    done: AtomicUsize,
    /// Requests that were put off, found no node, or were cut off.
    put_off: AtomicUsize,
    refused: AtomicUsize,
    cut: AtomicUsize,
}

pub struct Storm {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<Vec<Told>>>,
}

impl Storm {
    pub fn start(cluster: &Cluster, clients: usize) -> Self {
        let shared = Arc::<Shared>::default();
        let clients = (0..clients).map(|number| {
            let (shared, doors) = (Arc::clone(&shared), cluster.addresses());
            let http = Client::new();
            tokio::spawn(async move {
                let mut one = One { shared, doors, http, next: number };
                let mut told = Vec::new();
                while !one.shared.stop.load(Ordering::Relaxed) {
                    told.push(one.command(&format!("user_{number}_{}", told.len())).await);
                    one.shared.done.fetch_add(1, Ordering::Relaxed);
                }
                told
            })
        });
        let clients = clients.collect();
        Self { shared, clients }
    }

    /// Waits until so many more commands were acknowledged.
    pub async fn more(&self, count: usize) {
        let goal = self.shared.done.load(Ordering::Relaxed) + count;
        until("the clients go on", async || self.shared.done.load(Ordering::Relaxed) >= goal).await;
    }

    /// Every command that was begun is acknowledged when it returns.
    pub async fn stop(self) -> Vec<Told> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut told = Vec::new();
        for client in self.clients {
            told.extend(client.await.expect("the client ended well"));
        }
        let count = |it: &AtomicUsize| it.load(Ordering::Relaxed);
        let Shared { put_off, refused, cut, .. } = &*self.shared;
        let (put_off, refused, cut) = (count(put_off), count(refused), count(cut));
        let all = told.len();
        println!(
            "{all} users served; requests put off {put_off}, refused {refused}, cut off {cut}"
        );
        told
    }
}

struct One {
    shared: Arc<Shared>,
    doors: Vec<String>,
    http: Client,
    next: usize,
}

impl One {
    /// Of a user whom nobody knows: the first request also provisions it and begins its session.
    async fn command(&mut self, user: &str) -> Told {
        let mut claims = claims(user);
        claims["role"] = json!("creator");
        claims["subscription_tier"] = json!("premium");
        claims["permissions"] = json!(["videos:share"]);
        let token = signed(&claims);
        let body = json!({ "prompt": format!("a picture for {user}") });
        let asked = self.settle(&token, "videos/generate", 0, |request| {
            request.header("idempotency-key", "only").json(&body)
        });
        let asked = asked.await;
        let position = asked.position();
        let job = text(&asked.data(202), "job_id");
        let cancelled = self.next.is_multiple_of(2);
        if cancelled {
            let path = format!("jobs/{job}/cancel");
            let done = self.settle(&token, &path, position, |request| request.json(&json!({})));
            assert_eq!(done.await.data(200)["state"], "cancelled");
        }
        Told { user: user.to_owned(), job, cancelled }
    }

    async fn settle(
        &mut self,
        token: &str,
        path: &str,
        position: u64,
        shape: impl Fn(RequestBuilder) -> RequestBuilder,
    ) -> Answer {
        for _ in 0..2000 {
            self.next += 1;
            let door = &self.doors[self.next % self.doors.len()];
            let request = self.http.request(Method::POST, format!("{door}/api/v1/{path}"));
            let request = request.bearer_auth(token).header("x-log-position", position);
            let shared = &self.shared;
            let obstacle = match try_ask(shape(request).timeout(Duration::from_secs(20))).await {
                Ok(answer) if answer.status < 500 => return answer,
                Ok(answer) => {
                    assert_eq!(answer.status, 503, "{}", answer.body);
                    &shared.put_off
                }
                Err(error) if error.is_connect() => &shared.refused,
                Err(_) => &shared.cut,
            };
            obstacle.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        panic!("{path} was never answered");
    }
}

/// What was acknowledged is there at every node, once and whole, and nothing else is.
pub async fn assert_kept(cluster: &Cluster, told: &[Told]) {
    cluster.caught_up().await;
    for node in &cluster.nodes {
        for Told { user, job, cancelled } in told {
            let jobs = node.get(user, "jobs").await.data(200);
            let items = jobs["items"].as_array().expect("a list");
            assert_eq!((items.len(), &items[0]["job_id"]), (1, &json!(job)), "{user}: {jobs}");
            let state = if *cancelled { "cancelled" } else { "queued" };
            assert_eq!(items[0]["state"], state, "{user}");
        }
    }
    let story = cluster.story().await;
    let mut of_jobs: BTreeMap<&str, &Vec<String>> =
        story.iter().filter_map(|(name, it)| Some((name.strip_prefix("job-")?, it))).collect();
    for Told { job, cancelled, .. } in told {
        let whole = ["job.requested.v1", "job.cancel_requested.v1", "job.cancelled.v1"];
        let length = if *cancelled { 3 } else { 1 };
        assert_eq!(of_jobs.remove(&job[..]).expect("it is in the log"), &whole[..length]);
    }
    assert_eq!(of_jobs, BTreeMap::new(), "nobody asked for these");
    // A user's first events are one append: all of them or none.
    let mut users = story.iter().filter(|(name, _)| name.starts_with("user-"));
    let (_, whole) = users.next().expect("there are users");
    assert!(whole.len() > 1, "{whole:?}");
    for (name, types) in users {
        assert_eq!(types, whole, "{name} is half provisioned");
    }
    cluster.assert_as_replayed();
}
