//! Several real servers on one PostgreSQL and one store of the S3 protocol, looked at from outside:
//! what one node has answered holds at all of them, and nothing happens twice because there are more.

mod commands;
mod duties;
mod failures;
mod files;
mod leases;
mod reading;
mod storm;

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use crate::engine_faults::until;
use crate::postgres::{Postgres, free_port};
use crate::s3::S3;
use crate::server::{Answer, Server, Setup, ask, claims, signed};

const ADA: &str = "user_ada";
const WORKER: &str = "a-worker-token-of-the-tests";
const NODES: usize = 3;

/// Three nodes that have everything in common that several nodes must.
struct Cluster {
    nodes: Vec<Server>,
    /// What all nodes have in common.
    setup: Setup,
    _store: S3,
}

impl Cluster {
    async fn start() -> Self {
        Self::start_as(|setup| setup).await
    }

    /// Over a database of its own, with other settings.
    async fn start_as(shape: impl Fn(Setup) -> Setup) -> Self {
        let database = Postgres::shared().database().await;
        Self::over(&Postgres::shared().address(&database), shape).await
    }

    /// All at once, so that they find the database and the store empty together. Each keeps its
    /// port when it is started again.
    async fn over(log: &str, shape: impl Fn(Setup) -> Setup) -> Self {
        let store = S3::start().await;
        let setup = Setup::clerk()
            .with("T2M_LOG", log)
            .with("T2M_BLOBS", &store.url)
            .with("T2M_MASTER_KEY", STANDARD.encode([7; 32]))
            .with("T2M_WORKER_TOKENS", WORKER);
        let setup = store.variables().fold(setup, |it, (name, value)| it.with(name, value));
        let setup = shape(setup);
        let setups: Vec<Setup> = (0..NODES)
            .map(|_| setup.clone().with("T2M_LISTEN", format!("127.0.0.1:{}", free_port())))
            .collect();
        let nodes = std::thread::scope(|scope| {
            let starting: Vec<_> =
                setups.into_iter().map(|setup| scope.spawn(|| Server::start(setup))).collect();
            starting.into_iter().map(|node| node.join().expect("the node starts")).collect()
        });
        Self { nodes, setup, _store: store }
    }

    /// Any node, the next number the next one.
    fn node(&self, number: usize) -> &Server {
        &self.nodes[number % NODES]
    }

    fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.address.clone()).collect()
    }

    /// A node that is dead already, or dies now, comes back with its data and at its address.
    fn start_again(&mut self, number: usize) {
        let node = self.nodes.remove(number);
        self.nodes.insert(number, node.start_again());
    }

    /// Waits until all nodes are where the log ends; where that is.
    async fn caught_up(&self) -> u64 {
        let mut end = 0;
        until("all nodes have caught up", async || {
            let mut at = Vec::new();
            for node in &self.nodes {
                let ready = ask(node.request(Method::GET, "system/ready")).await;
                at.push(ready.body["data"]["log_position"].clone());
                at.push(ready.body["data"]["view_position"].clone());
            }
            end = at[0].as_u64().unwrap_or_default();
            at[0].is_u64() && at.iter().all(|position| *position == at[0])
        })
        .await;
        end
    }

    /// What a user reads is the same at all nodes, and each node's views are those of a replay.
    async fn assert_alike(&self, users: &[&str]) {
        self.caught_up().await;
        for user in users {
            for path in ["me", "jobs?limit=200", "files?limit=200"] {
                let mut told = Vec::new();
                for node in &self.nodes {
                    told.push(node.get(user, path).await.data(200));
                }
                assert!(told.iter().all(|it| *it == told[0]), "{user} {path}: {told:#?}");
            }
        }
        self.assert_as_replayed();
    }

    fn assert_as_replayed(&self) {
        for (number, node) in self.nodes.iter().enumerate() {
            let diff = node.printed(&["replay", "--diff"]);
            assert!(diff.contains("live and replayed alike"), "node {number}: {diff}");
        }
    }

    /// The types of the events of each stream, in their order.
    async fn story(&self) -> BTreeMap<String, Vec<String>> {
        let mut story: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut path = "admin/events?limit=200&from=0".to_owned();
        loop {
            let page = as_admin(&self.nodes[0], Method::GET, &path, None).await.data(200);
            for event in page["items"].as_array().expect("a list") {
                story.entry(text(event, "stream")).or_default().push(text(event, "type"));
            }
            let Some(cursor) = page["next_cursor"].as_str() else { return story };
            path = format!("admin/events?limit=200&cursor={cursor}");
        }
    }
}

async fn as_admin(node: &Server, method: Method, path: &str, body: Option<&Value>) -> Answer {
    let mut claims = claims("user_boss");
    claims["role"] = json!("admin");
    let request = node.request(method, path).bearer_auth(signed(&claims));
    ask(match body {
        Some(body) => request.json(body),
        None => request,
    })
    .await
}

/// A worker's call, with a body.
fn call(node: &Server, path: &str, body: &Value) -> RequestBuilder {
    node.request(Method::POST, &format!("worker/{path}")).bearer_auth(WORKER).json(body)
}

async fn lease(node: &Server, worker: &str, wait_s: u64) -> Option<Value> {
    let body = json!({ "worker_id": worker, "kinds": ["video"], "wait_s": wait_s });
    let answer = ask(call(node, "lease", &body)).await;
    match answer.status {
        204 => None,
        _ => Some(answer.data(200)),
    }
}

fn text(value: &Value, name: &str) -> String {
    value[name].as_str().unwrap_or_else(|| panic!("no {name} in {value}")).to_owned()
}

fn count(types: &[String], kind: &str) -> usize {
    types.iter().filter(|it| *it == kind).count()
}
