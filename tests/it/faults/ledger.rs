//! Clients that keep a record of what they were promised, and hold the server to it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use super::Dice;
use crate::server::{Answer, Server, ask, try_ask};

const USERS: [&str; 3] = ["user_ada", "user_bob", "user_eve"];
/// Commands under way at the same time.
const WRITERS: usize = 8;

/// A job that somebody asks for, as often as it takes; the key is its prompt too.
#[derive(Clone)]
struct Command {
    user: &'static str,
    key: String,
}

impl Command {
    fn request(&self, server: &Server) -> RequestBuilder {
        server
            .request_of(self.user, Method::POST, "videos/generate")
            .header("idempotency-key", &self.key)
            .json(&json!({ "prompt": self.key }))
    }
}

struct Promise {
    command: Command,
    job_id: String,
    position: u64,
}

/// What was asked and what was promised.
pub struct Ledger {
    pub dice: Dice,
    drawn: usize,
    promised: Vec<Promise>,
    /// How many promises were looked after before.
    checked: usize,
    /// Without an answer, or with one that says nothing: each may have happened, or not.
    open: Vec<Command>,
}

impl Ledger {
    pub fn new() -> Self {
        Self { dice: Dice::new(), drawn: 0, promised: Vec::new(), checked: 0, open: Vec::new() }
    }

    pub fn promises(&self) -> usize {
        self.promised.len()
    }

    /// Writes from several sides until nobody is answered any more; `fault` comes after `enough`
    /// promises.
    pub async fn write_until_gone(&mut self, server: &Server, enough: usize, fault: impl FnOnce()) {
        let (heard, fault) = (Cell::new(0), Cell::new(Some(fault)));
        let ledger = RefCell::new(self);
        let write = async || {
            loop {
                let command = ledger.borrow_mut().draw();
                let answer = try_ask(command.request(server)).await;
                let gone = answer.is_err();
                if ledger.borrow_mut().record(command, answer).is_some() {
                    heard.set(heard.get() + 1);
                }
                if heard.get() >= enough
                    && let Some(fault) = fault.take()
                {
                    fault();
                }
                if gone {
                    return;
                }
            }
        };
        join_all((0..WRITERS).map(|_| write())).await;
        assert!(fault.take().is_none(), "the server went by itself");
    }

    /// One command; the answer unless it was a promise.
    pub async fn write(&mut self, server: &Server) -> Result<(), Option<Answer>> {
        let command = self.draw();
        let answer = try_ask(command.request(server)).await;
        let refused = answer.as_ref().ok().filter(|answer| answer.status >= 500).map(copy);
        self.record(command, answer).ok_or(refused)
    }

    /// So many commands at once; the answers that were no promise.
    pub async fn write_at_once(&mut self, server: &Server, count: usize) -> Vec<Answer> {
        let commands: Vec<_> = (0..count).map(|_| self.draw()).collect();
        let asked = commands.iter().map(|command| ask(command.request(server)));
        let answers = join_all(asked).await;
        let mut refused = Vec::new();
        for (command, answer) in commands.into_iter().zip(answers) {
            refused.extend((answer.status >= 500).then(|| copy(&answer)));
            self.record(command, Ok(answer));
        }
        refused
    }

    fn draw(&mut self) -> Command {
        self.drawn += 1;
        let user = USERS[self.dice.between(0, USERS.len())];
        Command { user, key: format!("{user}-{}", self.drawn) }
    }

    /// Nothing but a promise, an error of the server's or silence can follow a good command.
    fn record(&mut self, command: Command, answer: reqwest::Result<Answer>) -> Option<()> {
        match answer {
            Ok(answer) if answer.status < 500 => {
                let position = answer.position();
                let job = answer.data(202);
                let job_id = job["job_id"].as_str().expect("a job has an id").to_owned();
                self.promised.push(Promise { command, job_id, position });
                Some(())
            }
            Ok(_) | Err(_) => {
                self.open.push(command);
                None
            }
        }
    }

    /// Promises since the last look of which this server knows nothing, after a power cut say.
    pub async fn broken(&mut self, server: &Server) -> usize {
        let mut broken = 0;
        for Promise { command, job_id, .. } in &self.promised[self.checked..] {
            let job = server.get(command.user, &format!("jobs/{job_id}")).await;
            broken += usize::from(job.status != 200 || job.body["data"]["prompt"] != command.key);
        }
        broken
    }

    /// Every promise since the last look is kept, and what was left open can be had by asking once
    /// more. This server is healthy.
    pub async fn settle(&mut self, server: &Server) {
        let furthest = self.promised.iter().map(|promise| promise.position).max().unwrap_or(0);
        let head = server.log_position().await;
        assert!(head >= furthest, "the log ends at {head}, before {furthest}");
        let broken = self.broken(server).await;
        assert_eq!(broken, 0, "acknowledged, and lost");
        self.checked = self.promised.len();
        for command in std::mem::take(&mut self.open) {
            let answer = ask(command.request(server)).await;
            assert_eq!(answer.status, 202, "{}", answer.body);
            self.record(command, Ok(answer));
        }
    }

    /// All that was promised is there and nothing twice, the chain is whole, and the views are what
    /// a replay gives.
    pub async fn audit(&mut self, server: &Server) {
        self.audit_jobs(server).await;
        server.printed(&["log", "verify"]);
        let compared = server.printed(&["replay", "--diff"]);
        assert!(compared.contains("live and replayed alike"), "{compared}");
    }

    /// The same of the jobs alone.
    pub async fn audit_jobs(&mut self, server: &Server) {
        self.settle(server).await;
        let mut shown = BTreeMap::new();
        for user in USERS {
            for job in jobs(server, user).await {
                let prompt = job["prompt"].as_str().expect("a prompt").to_owned();
                let job_id = job["job_id"].as_str().expect("an id").to_owned();
                assert_eq!(shown.insert(prompt.clone(), job_id), None, "{prompt} happened twice");
            }
        }
        for Promise { command, job_id, .. } in &self.promised {
            assert_eq!(shown.get(&command.key), Some(job_id), "{}", command.key);
        }
        assert_eq!(shown.len(), self.promised.len(), "more than was asked for");
        let positions: BTreeSet<u64> =
            self.promised.iter().map(|promise| promise.position).collect();
        assert_eq!(positions.len(), self.promised.len(), "two jobs at one position");
    }
}

fn copy(answer: &Answer) -> Answer {
    let Answer { status, headers, bytes, body } = answer;
    Answer { status: *status, headers: headers.clone(), bytes: bytes.clone(), body: body.clone() }
}

/// All jobs of a user.
async fn jobs(server: &Server, user: &str) -> Vec<Value> {
    let (mut jobs, mut path) = (Vec::new(), "jobs?limit=200".to_owned());
    loop {
        let mut page = server.get(user, &path).await.data(200);
        jobs.append(page["items"].as_array_mut().expect("a page has items"));
        let Some(cursor) = page["next_cursor"].as_str() else { return jobs };
        path = format!("jobs?limit=200&cursor={cursor}");
    }
}
