//! Clients that keep a record of what they were promised, and hold the server to it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use super::Dice;
use super::uploads::{self, Acknowledged};
use crate::server::{Answer, Server, ask, try_ask};

const USERS: [&str; 3] = ["user_ada", "user_bob", "user_eve"];
/// Commands under way at the same time.
const WRITERS: usize = 8;
/// Promises of earlier looks that each look takes in once more.
const AGAIN: usize = 4;
/// So many contents are those of more than one file.
const SHARED: usize = 4;
/// Jobs above all, and every kind early.
pub const ALL_KINDS: [Kind; 10] = [
    Kind::File,
    Kind::Job,
    Kind::Pieces,
    Kind::Job,
    Kind::FirstJob,
    Kind::Job,
    Kind::File,
    Kind::Job,
    Kind::Job,
    Kind::Job,
];

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// The key is its prompt too.
    Job,
    /// Of somebody who was never here, and gets a key to seal what is personal.
    FirstJob,
    /// The key is its name too.
    File,
    /// A file by tus, of which each piece is a promise.
    Pieces,
}

impl Kind {
    fn is_file(self) -> bool {
        matches!(self, Self::File | Self::Pieces)
    }

    /// Where such things are listed, and what is the key there and what the id.
    fn list(self) -> [&'static str; 3] {
        match self.is_file() {
            true => ["files", "filename", "file_id"],
            false => ["jobs", "prompt", "job_id"],
        }
    }
}

/// What somebody asks for, as often as it takes.
struct Command {
    kind: Kind,
    user: String,
    key: String,
    /// What a file's bytes follow from.
    contents: String,
    /// Of pieces.
    acknowledged: Option<Acknowledged>,
}

impl Command {
    /// The last answer, if it takes several requests.
    async fn ask(&mut self, server: &Server) -> reqwest::Result<Answer> {
        if !self.kind.is_file() {
            return try_ask(self.job(server)).await;
        }
        let (user, key, bytes) = (&self.user, &self.key, uploads::bytes_of(&self.contents));
        match self.kind {
            Kind::Pieces => {
                uploads::in_pieces(server, user, key, &bytes, &mut self.acknowledged).await
            }
            _ => try_ask(uploads::at_once(server, user, key, bytes)).await,
        }
    }

    fn job(&self, server: &Server) -> RequestBuilder {
        server
            .request_of(&self.user, Method::POST, "videos/generate")
            .header("idempotency-key", &self.key)
            .json(&json!({ "prompt": self.key }))
    }

    /// Of what a good answer promises.
    fn id_in(&self, answer: Answer) -> String {
        let data = match self.kind {
            Kind::Job | Kind::FirstJob => answer.data(202),
            Kind::File => answer.data(200),
            Kind::Pieces => return answer.header("x-file-id").to_owned(),
        };
        data[self.kind.list()[2]].as_str().expect("it has an id").to_owned()
    }
}

struct Promise {
    command: Command,
    id: String,
    position: u64,
}

impl Promise {
    async fn is_kept(&self, server: &Server) -> bool {
        let Self { command, id, .. } = self;
        if command.kind.is_file() {
            let bytes = uploads::bytes_of(&command.contents);
            return uploads::is_there(server, &command.user, id, &bytes).await;
        }
        let job = server.get(&command.user, &format!("jobs/{id}")).await;
        if job.status != 200 || job.body["data"]["prompt"] != command.key {
            println!("{id}: {} was acknowledged, now {}", command.key, job.body);
            return false;
        }
        if command.kind == Kind::FirstJob {
            // The read model may hold what the log does not: a job is found in the log when it is asked
            // for again, and opened with its owner's key.
            let again = ask(command.job(server)).await;
            let is_known = again.status == 202 && again.header("idempotent-replayed") == "true";
            if !is_known {
                println!("{id}: {} was asked for, now {}", command.key, again.body);
            }
            return is_known;
        }
        true
    }
}

/// What was asked and what was promised.
pub struct Ledger {
    pub dice: Dice,
    /// What is asked for, in turn.
    kinds: &'static [Kind],
    drawn: usize,
    promised: Vec<Promise>,
    /// How many promises were looked after before.
    checked: usize,
    /// Without an answer, or with one that says nothing: each may have happened, or not.
    open: Vec<Command>,
    /// So many times a file's bytes were compared.
    files_read: usize,
    /// So many times an upload was looked for where it had been acknowledged.
    offsets_read: usize,
}

impl Ledger {
    /// Of jobs alone.
    pub fn new() -> Self {
        Self::of(&[Kind::Job])
    }

    pub fn of(kinds: &'static [Kind]) -> Self {
        Self {
            dice: Dice::new(),
            kinds,
            drawn: 0,
            promised: Vec::new(),
            checked: 0,
            open: Vec::new(),
            files_read: 0,
            offsets_read: 0,
        }
    }

    /// What was promised and looked after.
    ///
    /// # Panics
    /// Some kind was not, so that nothing was shown of it.
    pub fn tally(&self) -> String {
        let count = |kind: Kind| {
            let count = self.promised.iter().filter(|it| it.command.kind == kind).count();
            assert!(count > 0 || !self.kinds.contains(&kind), "{kind:?} was never promised");
            count
        };
        let [jobs, first, files, pieces] =
            [Kind::Job, Kind::FirstJob, Kind::File, Kind::Pieces].map(count);
        assert!(self.files_read > 0 || files + pieces == 0, "no file was read");
        format!(
            "{} promises: {jobs} jobs, {first} first jobs of users, {files} files and {pieces} in \
             pieces; bytes of files compared {} times, offsets {} times",
            self.promised.len(),
            self.files_read,
            self.offsets_read,
        )
    }

    /// Writes from several sides until nobody is answered any more; `fault` comes after `enough`
    /// promises.
    pub async fn write_until_gone(&mut self, server: &Server, enough: usize, fault: impl FnOnce()) {
        let (heard, fault) = (Cell::new(0), Cell::new(Some(fault)));
        let ledger = RefCell::new(self);
        let write = async || {
            loop {
                let mut command = ledger.borrow_mut().draw();
                let answer = command.ask(server).await;
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
        let mut command = self.draw();
        let answer = command.ask(server).await;
        let refused = answer.as_ref().ok().filter(|answer| answer.status >= 500).map(copy);
        self.record(command, answer).ok_or(refused)
    }

    /// So many commands at once; the answers that were no promise.
    pub async fn write_at_once(&mut self, server: &Server, count: usize) -> Vec<Answer> {
        let mut commands: Vec<_> = (0..count).map(|_| self.draw()).collect();
        let answers = join_all(commands.iter_mut().map(|command| command.ask(server))).await;
        let mut refused = Vec::new();
        for (command, answer) in commands.into_iter().zip(answers) {
            let answer = answer.expect("the server answers");
            refused.extend((answer.status >= 500).then(|| copy(&answer)));
            self.record(command, Ok(answer));
        }
        refused
    }

    fn draw(&mut self) -> Command {
        let kind = self.kinds[self.drawn % self.kinds.len()];
        self.drawn += 1;
        let number = self.drawn;
        let user = match kind {
            Kind::FirstJob => format!("user_new_{number}"),
            _ => USERS[self.dice.between(0, USERS.len())].to_owned(),
        };
        let key = format!("{user}-{number}");
        let contents = match self.dice.between(0, 2 * SHARED) {
            shared @ 0..SHARED => format!("shared-{shared}"),
            _ => key.clone(),
        };
        Command { kind, user, key, contents, acknowledged: None }
    }

    /// Nothing but a promise, an error of the server's or silence can follow a good command.
    fn record(&mut self, command: Command, answer: reqwest::Result<Answer>) -> Option<()> {
        match answer {
            Ok(answer) if answer.status < 500 => {
                assert!(answer.status < 300, "{}: {}", command.key, answer.body);
                let position = answer.position();
                let id = command.id_in(answer);
                self.promised.push(Promise { command, id, position });
                Some(())
            }
            Ok(_) | Err(_) => {
                self.open.push(command);
                None
            }
        }
    }

    /// Promises since the last look that this server does not keep, after a power cut say; some earlier
    /// ones, which what came since may have harmed; and uploads that fell behind what was acknowledged.
    pub async fn broken(&mut self, server: &Server) -> usize {
        let again = if self.checked == 0 { 0 } else { AGAIN };
        let again: Vec<usize> = (0..again).map(|_| self.dice.between(0, self.checked)).collect();
        let again = again.into_iter().map(|index| &self.promised[index]);
        let looked_at: Vec<&Promise> = self.promised[self.checked..].iter().chain(again).collect();
        self.files_read += looked_at.iter().filter(|it| it.command.kind.is_file()).count();
        let mut broken = lost(server, &looked_at).await;
        for Command { user, acknowledged, .. } in &self.open {
            if let Some(acknowledged) = acknowledged {
                self.offsets_read += 1;
                broken += usize::from(!acknowledged.is_kept(server, user).await);
            }
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
        for mut command in std::mem::take(&mut self.open) {
            let answer = command.ask(server).await.expect("the server answers");
            assert!(answer.status < 300, "{}: {}", command.key, answer.body);
            self.record(command, Ok(answer));
        }
    }

    /// All that was promised is there and nothing twice, the chain is whole, and the views are what
    /// a replay gives.
    pub async fn audit(&mut self, server: &Server) {
        self.audit_promises(server).await;
        server.printed(&["log", "verify"]);
        let compared = server.printed(&["replay", "--diff"]);
        assert!(compared.contains("live and replayed alike"), "{compared}");
    }

    /// Of that, what can be asked of a server.
    pub async fn audit_promises(&mut self, server: &Server) {
        self.settle(server).await;
        let files: Vec<_> = self.promised.iter().filter(|it| it.command.kind.is_file()).collect();
        self.files_read += files.len();
        assert_eq!(lost(server, &files).await, 0, "acknowledged, and lost");
        let promised = self.promised.iter().map(|Promise { command, .. }| command);
        let lists: BTreeSet<_> = promised.map(|it| (it.user.as_str(), it.kind.list())).collect();
        let mut shown = BTreeMap::new();
        for (user, [list, key, id]) in lists {
            for item in listed(server, user, list).await {
                let key = item[key].as_str().expect("a key").to_owned();
                let id = item[id].as_str().expect("an id").to_owned();
                assert_eq!(shown.insert(key.clone(), id), None, "{key} happened twice");
            }
        }
        for Promise { command, id, .. } in &self.promised {
            assert_eq!(shown.get(&command.key), Some(id), "{}", command.key);
        }
        assert_eq!(shown.len(), self.promised.len(), "more than was asked for");
        let positions: BTreeSet<u64> =
            self.promised.iter().map(|promise| promise.position).collect();
        assert_eq!(positions.len(), self.promised.len(), "two promises at one position");
    }
}

/// How many are not kept.
async fn lost(server: &Server, promised: &[&Promise]) -> usize {
    let mut lost = 0;
    for some in promised.chunks(WRITERS) {
        let kept = join_all(some.iter().map(|promise| promise.is_kept(server))).await;
        lost += kept.into_iter().filter(|is_kept| !is_kept).count();
    }
    lost
}

fn copy(answer: &Answer) -> Answer {
    let Answer { status, headers, bytes, body } = answer;
    Answer { status: *status, headers: headers.clone(), bytes: bytes.clone(), body: body.clone() }
}

/// All that a user has of a kind.
async fn listed(server: &Server, user: &str, list: &str) -> Vec<Value> {
    let (mut items, mut path) = (Vec::new(), format!("{list}?limit=200"));
    loop {
        let mut page = server.get(user, &path).await.data(200);
        items.append(page["items"].as_array_mut().expect("a page has items"));
        let Some(cursor) = page["next_cursor"].as_str() else { return items };
        path = format!("{list}?limit=200&cursor={cursor}");
    }
}
