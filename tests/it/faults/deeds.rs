//! What needs more of a disk than the log: files, whose bytes are blobs, and people, who have keys while
//! they are here and tombstones once they are gone. A record of what was promised of them, to which the
//! server is held.

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use super::{until, uploads};
use crate::server::{Answer, Server, ask, try_ask};

const OWNER: &str = "user_fay";
/// Of each kind.
const DEEDS: usize = 2;

/// Something to be asked for, as often as it takes.
#[derive(Clone, PartialEq)]
enum Deed {
    /// A file of this name, whose bytes follow from it.
    File(String),
    /// Clerk tells of a new user.
    Arrival(String),
    /// Clerk tells that the user is gone.
    Departure(String),
}

impl Deed {
    fn request(&self, server: &Server) -> RequestBuilder {
        match self {
            Self::File(name) => uploads::at_once(server, OWNER, name, uploads::bytes_of(name)),
            Self::Arrival(user) => {
                let data = json!({
                    "id": user, "first_name": format!("{user} the first"),
                    "email_addresses": [{ "id": "idn_1", "email_address": email_of(user) }],
                    "primary_email_address_id": "idn_1",
                    "updated_at": 1_767_225_600_000_i64, "created_at": 1_767_225_600_000_i64,
                });
                server.delivery(&format!("msg_arrival_{user}"), "user.created", &data)
            }
            Self::Departure(user) => {
                let data = json!({ "id": user, "deleted": true, "object": "user" });
                server.delivery(&format!("msg_departure_{user}"), "user.deleted", &data)
            }
        }
    }
}

struct Promise {
    deed: Deed,
    /// `data` of the answer.
    told: Value,
    /// People who have a session, which their first request begins, can be read without the log.
    is_known: bool,
}

/// What was asked and what was promised.
#[derive(Default)]
pub struct Deeds {
    promised: Vec<Promise>,
    /// Refused by a fault or not answered: each may have happened, or not.
    open: Vec<Deed>,
    /// Of what was promised.
    furthest: u64,
}

impl Deeds {
    /// Some of each kind, one after the other. Who has not arrived for certain does not leave.
    pub async fn ask(&mut self, server: &Server) {
        for number in 0..DEEDS {
            let [stays, leaves] = ["stays", "leaves"].map(|it| format!("user_{it}_{number}"));
            self.ask_for(server, Deed::File(format!("file-{number}.txt"))).await;
            self.ask_for(server, Deed::Arrival(stays)).await;
            if self.ask_for(server, Deed::Arrival(leaves.clone())).await {
                self.ask_for(server, Deed::Departure(leaves)).await;
            }
        }
    }

    /// Whether it was promised.
    async fn ask_for(&mut self, server: &Server, deed: Deed) -> bool {
        let answer = match try_ask(deed.request(server)).await {
            Ok(answer) if answer.status < 500 => answer,
            Ok(_) | Err(_) => {
                self.open.push(deed);
                return false;
            }
        };
        assert_eq!(answer.status, 200, "{}", answer.body);
        self.furthest = self.furthest.max(answer.position());
        let told = answer.data(200);
        let is_known = match &deed {
            Deed::Arrival(user) => try_me(server, user).await.is_some_and(|it| it.status == 200),
            Deed::File(_) | Deed::Departure(_) => true,
        };
        self.promised.push(Promise { deed, told, is_known });
        true
    }

    /// Asks once more for what is open, of a server and a disk that are well; then all of it is there.
    pub async fn settle(&mut self, server: &Server) {
        let head = server.log_position().await;
        assert!(head >= self.furthest, "the log ends at {head}, before {}", self.furthest);
        for deed in std::mem::take(&mut self.open) {
            let again = ask(deed.request(server)).await;
            assert_eq!(again.status, 200, "{}", again.body);
            self.promised.push(Promise { told: again.data(200), deed, is_known: true });
        }
        for promise in &mut self.promised {
            promise.is_known = true;
        }
        self.check(server).await;
    }

    /// Whatever was promised can be read, however ill the log is.
    pub async fn check(&self, server: &Server) {
        for Promise { deed, told, is_known } in &self.promised {
            match deed {
                Deed::File(name) => {
                    let id = told["file_id"].as_str().expect("a file has an id");
                    let bytes = uploads::bytes_of(name);
                    assert!(uploads::is_there(server, OWNER, id, &bytes).await, "{name} is lost");
                }
                Deed::Arrival(user) if *is_known && !self.may_have_left(user) => {
                    let me = server.get(user, "me").await.data(200);
                    assert_eq!(me["user"]["email"], email_of(user), "{me}");
                    assert_eq!(me["user"]["first_name"], format!("{user} the first"), "{me}");
                }
                Deed::Arrival(_) => {}
                Deed::Departure(user) => {
                    let refused = server.get(user, "me").await;
                    assert!(refused.body.to_string().contains("user_deleted"), "{}", refused.body);
                    assert!(matches!(refused.status, 401 | 403), "{}", refused.status);
                }
            }
        }
    }

    /// Whoever is said to be gone has a tombstone and no key, nor half a one.
    pub async fn wait_for_erasures(&self, server: &Server) {
        until("those who left are erased", async || self.are_erased(server)).await;
    }

    /// The same, without the wait.
    pub fn are_erased(&self, server: &Server) -> bool {
        let blobs = server.data_dir().join("blobs");
        let keys: Vec<_> = std::fs::read_dir(blobs.join("keys")).into_iter().flatten().collect();
        let is_key_of = |name: &str, user: &str| {
            name.strip_prefix(user).is_some_and(|rest| rest.is_empty() || rest.starts_with('#'))
        };
        self.promised.iter().all(|promise| {
            let Deed::Departure(user) = &promise.deed else { return true };
            let has_key = keys
                .iter()
                .flatten()
                .any(|file| is_key_of(&file.file_name().to_string_lossy(), user));
            blobs.join("erased").join(user).exists() && !has_key
        })
    }

    fn may_have_left(&self, user: &str) -> bool {
        let departure = Deed::Departure(user.to_owned());
        self.open.contains(&departure) || self.promised.iter().any(|it| it.deed == departure)
    }
}

async fn try_me(server: &Server, user: &str) -> Option<Answer> {
    try_ask(server.request_of(user, Method::GET, "me")).await.ok()
}

fn email_of(user: &str) -> String {
    format!("{user}@people.test")
}
