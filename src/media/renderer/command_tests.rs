use std::process::Command as Tool;

use tempfile::TempDir;
use uuid::Uuid;

use super::*;
use crate::domain::ids::{FileId, JobId};
use crate::domain::job::{AspectRatio, Quality, VideoOptions};
use crate::domain::translation::{Format, TranslationOptions};
use crate::media::renderer::Engine;

const LIMITS: Limits = Limits {
    time: Duration::from_secs(60),
    memory_bytes: 4 << 30,
    output_bytes: 64 << 20,
    scratch_bytes: 256 << 20,
};

fn translation(format: Format) -> Work {
    let options = TranslationOptions {
        source_file_id: FileId(Uuid::from_u128(1)),
        format,
        source_language: None,
        target_language: None,
        model_name: "m".to_owned(),
        style_data: None,
        segment_size: 15_000,
        has_api_key: true,
    };
    Work {
        job_id: JobId(Uuid::from_u128(2)),
        request_id: Some("req_of_the_tests".to_owned()),
        attempt: 1,
        prompt: "film.srt".to_owned(),
        options: Options::Translation(options),
        source: None,
        api_key: Some(Secret::from("key-of-the-tests".to_owned())),
    }
}

fn video() -> Work {
    let options = VideoOptions {
        duration: 1,
        quality: Quality::P480,
        aspect_ratio: AspectRatio::Square,
        style: None,
        seed: 1,
        engine: None,
        source_file_id: None,
    };
    let prompt = "$(rm -rf /) `x` 'a' %{b}: a lighthouse".to_owned();
    Work { prompt, options: Options::Video(options), api_key: None, ..translation(Format::Text) }
}

/// An engine in a directory of its own that lets `sh` read a script, with the job in `$job`.
struct Bench {
    dir: TempDir,
    engine: Engine,
    stop: watch::Sender<bool>,
    progress: watch::Sender<Progress>,
}

impl Bench {
    fn new(script: &str, limits: Limits) -> Self {
        let script = format!("read -r job; {script}");
        let words = ["sh", "-c", &script].map(str::to_owned).to_vec();
        Self::of(words, limits)
    }

    fn of(words: Vec<String>, limits: Limits) -> Self {
        Self {
            dir: TempDir::new().unwrap(),
            engine: Engine::Command(CommandEngine::new(words, limits)),
            stop: watch::channel(false).0,
            progress: watch::channel(Progress::default()).0,
        }
    }

    async fn make(&self, work: &Work) -> Result<Made, Error> {
        self.engine.make(work, self.dir.path(), &self.progress, self.stop.subscribe()).await
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("scratch").join(name)
    }
}

/// The words of a failure, and whether it is worth another attempt.
async fn failure(script: &str) -> (String, bool) {
    failure_within(script, LIMITS).await
}

async fn failure_within(script: &str, limits: Limits) -> (String, bool) {
    match Bench::new(script, limits).make(&translation(Format::Text)).await {
        Err(Error::Engine { words, retryable }) => (words, retryable),
        other => panic!("{script}: {other:?}"),
    }
}

#[tokio::test]
async fn a_program_gets_the_job_and_its_file_is_the_result() {
    let bench = Bench::new(
        r#"printf '%s\n' "$job" > job.json; printf '%s\n' '{"progress": 40.7, "message": "half\nway"}'
           echo garbage; echo '{"progress": 10}'; printf '\303\241rbol' > ../output.txt"#,
        LIMITS,
    );
    let made = bench.make(&translation(Format::Text)).await.unwrap();
    assert_eq!(made.main.content_type, "text/plain");
    assert_eq!(std::fs::read_to_string(&made.main.path).unwrap(), "árbol");
    let said = Progress { percent: 40, message: Some("halfway".to_owned()) };
    assert_eq!(*bench.progress.borrow(), said, "progress never falls");
    let job: serde_json::Value =
        serde_json::from_slice(&std::fs::read(bench.path("job.json")).unwrap()).unwrap();
    assert_eq!(
        (&job["kind"], &job["api_key"]),
        (&"translation".into(), &"key-of-the-tests".into())
    );
    assert_eq!(job["request_id"], "req_of_the_tests");
    assert_eq!(job["options"]["segment_size"], 15_000);
    assert_eq!(job["output_path"], made.main.path.to_str().unwrap());
    let unknown = Work { request_id: None, ..translation(Format::Text) };
    let told = document(&unknown, "output".as_ref(), "scratch".as_ref()).unwrap();
    assert!(!String::from_utf8(told).unwrap().contains("request_id"));
}

#[tokio::test]
async fn a_failure_says_why_without_the_secret() {
    let (words, retryable) = failure(
        "echo first >&2; echo \"bad key 'key-of-the-tests'\" >&2; printf 'cut key-of-the' >&2; exit 3",
    )
    .await;
    assert!(!retryable);
    assert_eq!(words, "the engine failed with exit code 3\nfirst\nbad key '***'\ncut ***");
    assert_eq!(failure("exit 75").await, ("the engine asks to be tried again later".into(), true));
    assert_eq!(failure("kill -KILL $$").await, ("the engine was ended by signal 9".into(), true));
}

#[tokio::test]
async fn what_a_program_prints_is_kept_in_bounds() {
    let flood = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done >&2
                 head -c 5000000 /dev/zero; exit 1";
    let (words, _) = failure(flood).await;
    let lines: Vec<&str> = words.lines().collect();
    assert_eq!(lines.len(), 1 + LAST_LINES);
    assert_eq!(lines[1], "line 2980");
    let long = "i=0; while [ $i -lt 30 ]; do printf '%0500d\\n' 7; i=$((i+1)); done >&2; exit 1";
    let (words, _) = failure(long).await;
    assert_eq!(words.lines().count(), 3, "as many as there is room for");
    assert!(words.chars().count() <= WORDS_CHARACTERS);
}

#[tokio::test]
async fn only_a_plausible_output_is_taken() {
    let none = failure("exit 0").await;
    assert_eq!(none, ("the engine wrote no output".into(), false));
    for (script, fault) in [
        ("> ../output.txt", "the engine's output is empty"),
        ("mkdir ../output.txt", "the engine's output is not a file"),
        ("ln -s /etc/passwd ../output.txt", "the engine's output is not a file"),
        ("printf 'a\\377b' > ../output.txt", "the engine's output is not text"),
        ("printf 'a\\000b' > ../output.txt", "the engine's output is not text"),
        ("printf 'cut \\303' > ../output.txt", "the engine's output is not text"),
    ] {
        assert_eq!(failure(script).await.0, fault, "{script}");
    }
    for format in [Format::Srt, Format::Vtt] {
        let made = Bench::new("echo hi > ../output.srt; echo hi > ../output.vtt", LIMITS);
        let made = made.make(&translation(format)).await;
        assert!(matches!(made, Err(Error::Engine { .. })), "{format:?}: {made:?}");
    }
    let text = Bench::new("echo hi > ../output.mp4", LIMITS).make(&video()).await;
    assert_eq!(text.unwrap_err().to_string(), "the engine's output is not a video");
}

#[tokio::test]
async fn time_memory_and_file_size_are_bounded() {
    let time = Limits { time: Duration::from_millis(200), ..LIMITS };
    let (words, retryable) = failure_within("sleep 1000", time).await;
    assert_eq!((words.as_str(), retryable), ("the engine took longer than 0 s", false));
    let memory = Limits { memory_bytes: 256 << 20, ..LIMITS };
    let hungry = "python3 -c 'bytearray(1 << 30)' && echo hi > ../output.txt";
    let (words, _) = failure_within(hungry, memory).await;
    assert!(words.contains("MemoryError"), "{words}");
    let enough = "python3 -c 'bytearray(1 << 24)' && echo hi > ../output.txt";
    Bench::new(enough, memory).make(&translation(Format::Text)).await.unwrap();
    let size = Limits { output_bytes: 1 << 20, ..LIMITS };
    let large =
        "head -c 3000000 /dev/zero | tr '\\0' x > ../output.txt && echo unbounded >&2; exit 9";
    let (words, _) = failure_within(large, size).await;
    assert!(!words.contains("unbounded"), "{words}");
}

#[tokio::test]
async fn a_program_sees_nothing_of_the_servers_environment() {
    let script = "test -n \"$PATH\" && ! env | grep -q CARGO && env > ../output.txt";
    let bench = Bench::new(script, LIMITS);
    let made = bench.make(&translation(Format::Text)).await.unwrap();
    let seen = std::fs::read_to_string(made.main.path).unwrap();
    for line in seen.lines() {
        let name = line.split('=').next().unwrap();
        let known = ["PATH", "HOME", "LANG", "TZ", "TMPDIR", "PWD", "OLDPWD", "SHLVL", "_"];
        assert!(known.contains(&name) || name.starts_with("LC_"), "{line}");
    }
}

/// Starts a child that would go on for ever, tells their ids, and hears no SIGTERM.
const STUBBORN: &str = "trap '' TERM; sleep 100000 & echo $$ $! > ids.new; mv ids.new ids
                        while :; do sleep 1000; done";

async fn ids(bench: &Bench) -> Vec<String> {
    loop {
        if let Ok(ids) = std::fs::read_to_string(bench.path("ids")) {
            return ids.split_whitespace().map(str::to_owned).collect();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A process that is dead and not yet taken leave of counts as gone.
fn runs(id: &str) -> bool {
    let state = Tool::new("ps").args(["-o", "stat=", "-p", id]).output().unwrap().stdout;
    !state.is_empty() && !state.starts_with(b"Z")
}

async fn gone(ids: &[String]) {
    let waiting = async {
        while ids.iter().any(|id| runs(id)) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), waiting).await.expect("they end");
}

#[tokio::test]
async fn a_cancelled_program_ends_with_its_children_within_two_seconds() {
    let bench = Bench::new(STUBBORN, LIMITS);
    let work = translation(Format::Text);
    let (made, ids) = tokio::join!(bench.make(&work), async {
        let ids = ids(&bench).await;
        assert!(ids.iter().all(|id| runs(id)));
        bench.stop.send_replace(true);
        ids
    });
    assert!(matches!(made, Err(Error::Cancelled)), "{made:?}");
    gone(&ids).await;
    assert!(TIDY_UP_AND_LAST_WORDS < Duration::from_secs(2));
}

/// What [`Group::stop`] may take before the end is certain.
const TIDY_UP_AND_LAST_WORDS: Duration = super::super::process::TIDY_UP;

#[tokio::test]
async fn a_program_whose_runner_goes_away_ends_with_its_children() {
    let bench = Bench::new(STUBBORN, LIMITS);
    let work = translation(Format::Text);
    let ids = tokio::select! {
        made = bench.make(&work) => panic!("{made:?}"),
        ids = ids(&bench) => ids,
    };
    gone(&ids).await;
}

#[tokio::test]
async fn what_a_program_leaves_running_ends_with_it_and_does_not_hold_up_the_result() {
    let script = "sleep 100000 & echo $! > ids; echo hi > ../output.txt";
    let bench = Bench::new(script, LIMITS);
    bench.make(&translation(Format::Text)).await.unwrap();
    gone(&ids(&bench).await).await;
}

#[tokio::test]
async fn a_program_that_reads_nothing_may_still_succeed() {
    let words = ["sh", "-c", "exec <&-; echo hi > ../output.txt"].map(str::to_owned).to_vec();
    Bench::of(words, LIMITS).make(&translation(Format::Text)).await.unwrap();
}

#[tokio::test]
async fn a_program_that_cannot_be_run_is_the_machines_fault_and_not_the_jobs() {
    let missing = Bench::of(vec!["/no/such/program".to_owned()], LIMITS);
    let made = missing.make(&translation(Format::Text)).await;
    assert!(matches!(made, Err(Error::NotRun(_))), "{made:?}");
    for code in [78, 126, 127] {
        let bench = Bench::new(&format!("echo why >&2; exit {code}"), LIMITS);
        let Err(Error::NotRun(words)) = bench.make(&translation(Format::Text)).await else {
            panic!("{code} is of the job");
        };
        assert_eq!(words, format!("the engine could not be run (exit code {code})\nwhy"));
    }
    assert!(!failure("exit 125").await.1, "a program may say so itself");
}

fn example(name: &str) -> Vec<String> {
    vec![format!("{}/scripts/engines/{name}", env!("CARGO_MANIFEST_DIR"))]
}

#[tokio::test]
async fn the_ffmpeg_example_makes_the_video_that_was_asked_for() {
    let bench = Bench::of(example("ffmpeg-title"), LIMITS);
    let made = bench.make(&video()).await.unwrap();
    assert_eq!(
        (made.main.content_type.as_str(), made.width, made.height),
        ("video/mp4", Some(480), Some(480))
    );
    let probe = Tool::new("ffprobe")
        .args(["-v", "error", "-show_entries", "stream=codec_name,width,height:format=duration"])
        .args(["-of", "csv=p=0"])
        .arg(&made.main.path)
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&probe.stdout), "h264,480,480\n1.000000\n");
    assert_eq!(bench.progress.borrow().percent, 99);
}

#[tokio::test]
async fn the_apertium_example_translates_subtitles_and_keeps_their_timing() {
    let srt = "\u{feff}1\r\n00:00:01,000 --> 00:00:02,500 X1:40\r\n<i>The house</i> is big.\r\n\
               Hello, my friend.\r\n\r\n2\r\n00:00:03,000 --> 00:00:04,000\r\nGood morning\r\n";
    let vtt = "WEBVTT - A film\n\nNOTE not spoken\n\nfirst\n01.500 --> 02.000\nThe house.\n\n\
               00:03.000 --> 00:04.000 align:start\nThe house\n";
    let cases = [
        (
            Format::Srt,
            srt,
            srt.replace("The house</i> is big.", "La casa</i> es grande.")
                .replace("Hello, my friend.", "Hola, mi amigo.")
                .replace("Good morning", "Buenos días"),
        ),
        (
            Format::Vtt,
            vtt,
            vtt.replace(
                "00:03.000 --> 00:04.000 align:start\nThe house",
                "00:03.000 --> 00:04.000 align:start\nLa casa",
            ),
        ),
        (Format::Text, "The house.\n\nThe house", "La casa.\n\nLa casa".to_owned()),
    ];
    for (format, source, expected) in cases {
        let bench = Bench::of(example("translate-apertium"), LIMITS);
        let path = bench.dir.path().join("source");
        std::fs::write(&path, source).unwrap();
        let work = Work { source: Some(path), ..translation(format) };
        let made = bench.make(&work).await.unwrap();
        assert_eq!(std::fs::read_to_string(made.main.path).unwrap(), expected, "{format:?}");
    }
}

#[tokio::test]
async fn a_program_that_fills_the_disk_with_many_files_is_ended() {
    let script = "n=0; while :; do n=$((n+1)); head -c 1048576 /dev/zero > ../part-$n; done";
    let limits = Limits { scratch_bytes: 4 << 20, ..LIMITS };
    let (words, retryable) = failure_within(script, limits).await;
    assert!(words.contains("filled more than 4194304 bytes of the disk"), "{words}");
    assert!(!retryable);
}

#[tokio::test]
async fn a_poster_beside_the_video_comes_along_if_it_is_one() {
    let video = r"printf '\0\0\0\030ftypisom\0\0\0\0isommp42' > ../output.mp4";
    let cases = [
        (r"printf '\377\330\377\340\0\020JFIF' > ../poster.jpg", true),
        ("echo '<svg/>' > ../poster.jpg", false),
        ("ln -s /etc/passwd ../poster.jpg", false),
        ("mkdir ../poster.jpg", false),
        ("true", false),
    ];
    for (script, is_poster) in cases {
        let bench = Bench::new(&format!("{video}; {script}"), LIMITS);
        let made = bench.make(&self::video()).await.unwrap();
        let poster = made.poster.map(|it| it.content_type);
        assert_eq!(poster.as_deref(), is_poster.then_some("image/jpeg"), "{script}");
    }
}
