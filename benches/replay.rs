//! How fast the log becomes a read model again: a million events of lives as in `events/stories`,
//! replayed into a fresh file. `cargo bench --bench replay [-- EVENTS]`.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use futures_util::{StreamExt, stream};
use serde::Deserialize;
use serde_json::Value;
use t2m::actors::projector::Projector;
use t2m::log::{EmbeddedLog, EventLog, Expected, NewEvent};
use t2m::views::Views;
use uuid::Uuid;

const EVENTS: usize = 1_000_000;
const STORIES: [&str; 3] = [
    include_str!("../events/stories/video-from-prompt.jsonl"),
    include_str!("../events/stories/worker-crash-and-retry.jsonl"),
    include_str!("../events/stories/late-webhooks-after-deletion.jsonl"),
];

fn main() {
    // `cargo test --benches` only wants to know that it starts.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let events = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(EVENTS);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("log.sqlite");
        let written = fill(&path, events).await;
        replay(&path, &directory.path().join("views.sqlite"), written).await;
    });
}

/// Whole lives until there are as many events; answers how many there are.
async fn fill(path: &Path, events: usize) -> usize {
    let log = Arc::new(EmbeddedLog::open(path).expect("a log"));
    let began = Instant::now();
    let mut written = 0;
    let lives = (0..).map_while(|number| {
        let more = written < events;
        let life = life(number);
        written += life.len();
        more.then_some(life)
    });
    stream::iter(lives)
        .map(|life| {
            let log = Arc::clone(&log);
            async move {
                for (stream, event) in life {
                    log.append(&stream, Expected::Any, vec![event]).await.expect("appended");
                }
            }
        })
        .buffer_unordered(512)
        .collect::<()>()
        .await;
    let written = usize::try_from(*log.head().borrow()).expect("it fits");
    let rate = written as f64 / began.elapsed().as_secs_f64();
    println!("{written} events written at {rate:.0}/s");
    written
}

async fn replay(log: &Path, views: &Path, events: usize) {
    let log: Arc<dyn EventLog> = Arc::new(EmbeddedLog::open_read_only(log).expect("the log"));
    let views = Views::open(views).expect("a read model");
    let projector = Projector::new(log, views.clone());
    let began = Instant::now();
    while projector.apply_next(u64::MAX).await.expect("applied") > 0 {}
    let rate = events as f64 / began.elapsed().as_secs_f64();
    assert_eq!(views.checkpoint(), events as u64);
    println!("{events} events replayed at {rate:.0}/s");
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    println!("{}", status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default());
}

#[derive(Deserialize)]
struct Line<'a> {
    id: Uuid,
    stream: &'a str,
    r#type: &'a str,
    time: chrono::DateTime<chrono::Utc>,
    data: Value,
    metadata: Value,
}

/// A story, told of somebody else.
fn life(number: usize) -> Vec<(String, NewEvent)> {
    let story = STORIES[number % STORIES.len()];
    let story = renumbered(story, number)
        .replace("user_2", &format!("user_{number}_"))
        .replace("sess_2", &format!("sess_{number}_"));
    let event = |line| {
        let line: Line = serde_json::from_str(line).expect("a line of a story");
        let event = NewEvent {
            id: line.id,
            kind: line.r#type.to_owned(),
            time: line.time,
            data: line.data.to_string().into(),
            metadata: line.metadata.to_string().into(),
        };
        (line.stream.to_owned(), event)
    };
    story.lines().map(event).collect()
}

/// Gives every UUID a last group of its own.
fn renumbered(story: &str, number: usize) -> String {
    let mut text = String::with_capacity(story.len());
    let mut rest = story;
    while let Some(dash) = rest.find('-') {
        // 8-4-4-4-12
        let group = dash.checked_sub(8).and_then(|start| rest.get(start..start + 36));
        match group.filter(|group| Uuid::parse_str(group).is_ok()) {
            Some(_) => {
                text.push_str(&rest[..dash + 16]);
                text.push_str(&format!("{number:012x}"));
                rest = &rest[dash + 28..];
            }
            None => {
                text.push_str(&rest[..=dash]);
                rest = &rest[dash + 1..];
            }
        }
    }
    text + rest
}
