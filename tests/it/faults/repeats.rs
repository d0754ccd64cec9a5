//! Everything is sent three times, in any order, and the server is killed in the middle: each has
//! one effect.

use std::cell::{Cell, RefCell};

use futures_util::{StreamExt, stream};
use reqwest::{Method, RequestBuilder};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Dice, rounds};
use crate::server::{Server, Setup, now, try_ask};

const ADA: &str = "user_ada";
const AT_ONCE: usize = 16;

#[tokio::test]
async fn what_is_sent_three_times_across_a_kill_happens_once() {
    let mut dice = Dice::new();
    // Sessions that began long ago would end of themselves.
    let began = now();
    let sent: Vec<Sent> = (0..rounds(1000)).map(|number| Sent::numbered(number, began)).collect();
    let mut deliveries: Vec<&Sent> = sent.iter().flat_map(|sent| [sent; 3]).collect();
    dice.shuffle(&mut deliveries);

    let server = Server::start(Setup::clerk());
    let left = deliver(&server, deliveries, sent.len() * 3 / 2).await;
    assert!(!left.is_empty(), "nobody was cut off");
    let server = server.start_again();
    let left = deliver(&server, left, usize::MAX).await;
    assert!(left.is_empty(), "{} deliveries failed on a healthy server", left.len());

    let reference = Server::start(Setup::clerk());
    let left = deliver(&reference, sent.iter().collect(), usize::MAX).await;
    assert!(left.is_empty(), "{} deliveries failed on a healthy server", left.len());
    assert_eq!(types(&server), types(&reference), "sent three times, against sent once");
    server.printed(&["log", "verify"]);
    let compared = server.printed(&["replay", "--diff"]);
    assert!(compared.contains("live and replayed alike"), "{compared}");
}

/// Something with an effect that can be counted.
enum Sent {
    Video { key: String },
    User { id: String },
    Session { id: String, user: String, began: i64 },
}

impl Sent {
    fn numbered(number: usize, began: i64) -> Self {
        match number % 4 {
            0 | 1 => Self::Video { key: format!("video-{number}") },
            2 => Self::User { id: format!("user_{number}") },
            _ => Self::Session {
                id: format!("sess_{number}"),
                user: format!("user_{}", number - 1),
                began,
            },
        }
    }

    fn request(&self, server: &Server) -> RequestBuilder {
        match self {
            Self::Video { key } => server
                .request_of(ADA, Method::POST, "videos/generate")
                .header("idempotency-key", key)
                .json(&json!({ "prompt": key })),
            Self::User { id } => {
                let data = json!({
                    "id": id, "first_name": id, "updated_at": 1_767_225_600_000_i64,
                    "created_at": 1_767_225_600_000_i64, "email_addresses": [],
                });
                server.delivery(&format!("msg_{id}"), "user.created", &data)
            }
            Self::Session { id, user, began } => {
                let data = json!({
                    "id": id, "user_id": user, "status": "active",
                    "created_at": began * 1000, "updated_at": began * 1000,
                    "expire_at": (began + 86_400) * 1000, "abandon_at": (began + 86_400) * 1000,
                });
                server.delivery(&format!("msg_{id}"), "session.created", &data)
            }
        }
    }
}

/// Sends all; the server is killed after `enough` answers. What had no good answer comes back.
async fn deliver<'a>(server: &Server, deliveries: Vec<&'a Sent>, enough: usize) -> Vec<&'a Sent> {
    let (answered, left) = (Cell::new(0), RefCell::new(Vec::new()));
    stream::iter(deliveries)
        .for_each_concurrent(AT_ONCE, |sent| {
            let (answered, left) = (&answered, &left);
            async move {
                match try_ask(sent.request(server)).await {
                    Ok(answer) if answer.status < 300 => {
                        answered.set(answered.get() + 1);
                        if answered.get() == enough {
                            server.send(Signal::KILL);
                        }
                    }
                    Ok(answer) if answer.status < 500 => panic!("{}", answer.body),
                    Ok(answer) => {
                        println!("{} {}", answer.status, answer.body);
                        left.borrow_mut().push(sent);
                    }
                    Err(_) => left.borrow_mut().push(sent),
                }
            }
        })
        .await;
    left.into_inner()
}

/// How many events of each type there are, but for the one of which the clock decides: a start that is
/// heard of after more than a minute is noted as activity too.
fn types(server: &Server) -> Value {
    let printed = server.printed(&["log", "stats", "--json"]);
    let mut stats: Value = serde_json::from_str(&printed).expect("JSON");
    let types = stats["types"].as_object_mut().expect("types");
    types.remove("session.active.v1");
    assert!(!types.is_empty(), "{printed}");
    stats["types"].take()
}
