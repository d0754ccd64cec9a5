//! What we give in the hands of programs that nobody here wrote: ffprobe reads a generated video,
//! Chromium plays it to its end from the signed link of a running server, and shows the
//! documentation.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;
use t2m::media::renderer::{FRAMES_PER_SECOND, Rendered, Spec, dimensions, render};

#[test]
fn ffprobe_finds_in_a_generated_video_what_every_player_wants() {
    let directory = tempfile::tempdir().unwrap();
    let video = rendered(directory.path()).video;
    let probe = Command::new(installed("ffprobe"))
        .args(["-v", "error", "-of", "json", "-show_streams", "-show_format"])
        .arg(&video)
        .output()
        .unwrap();
    assert!(probe.status.success(), "{}", String::from_utf8_lossy(&probe.stderr));
    assert_eq!(String::from_utf8_lossy(&probe.stderr), "", "ffprobe complains");
    let found: Value = serde_json::from_slice(&probe.stdout).unwrap();
    let pictures = &found["streams"][0];
    assert_eq!(pictures["codec_name"], "h264");
    assert_eq!(pictures["pix_fmt"], "yuv420p");
    assert_eq!((&pictures["width"], &pictures["height"]), (&854.into(), &480.into()));
    assert_eq!(pictures["nb_frames"], (2 * FRAMES_PER_SECOND).to_string());
    let duration_s: f64 = found["format"]["duration"].as_str().unwrap().parse().unwrap();
    assert!((duration_s - 2.0).abs() < 0.05, "{duration_s} s");
}

#[test]
fn chromium_seeks_in_a_generated_video_and_plays_it_to_its_end_from_its_signed_link() {
    let chromium = installed("chromium");
    let directory = tempfile::tempdir().unwrap();
    let video = rendered(directory.path()).video;
    let server = Server::start(&directory.path().join("data"));
    let link = signed_link(&server.address, &video);
    let page = Page::serve(&link);
    let _browser = Killed(
        Command::new(chromium)
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
            .args(["--no-first-run", "--disable-background-networking", "--disable-sync"])
            .args(["--disable-component-update", "--disable-quic", "--no-proxy-server"])
            .arg("--autoplay-policy=no-user-gesture-required")
            .arg(format!("--user-data-dir={}", directory.path().join("profile").display()))
            .arg(&page.address)
            .env("HOME", directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    // Longer than a browser takes to start on a busy machine.
    let outcome = page.outcome.recv_timeout(Duration::from_secs(90));
    assert_eq!(outcome.as_deref(), Ok("854x480 of 2 s, seeked, played"));
}

#[test]
fn chromium_shows_the_documentation_although_its_policy_forbids_what_it_does_not_need() {
    let chromium = installed("chromium");
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(&directory.path().join("data"));
    let shown = Command::new(chromium)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        .args(["--no-first-run", "--disable-background-networking", "--no-proxy-server"])
        // Of the page's own time, which stands still while something is loaded.
        .args(["--virtual-time-budget=20000", "--enable-logging=stderr", "--dump-dom"])
        .arg(format!("--user-data-dir={}", directory.path().join("profile").display()))
        .arg(format!("{}/docs/", server.address))
        .env("HOME", directory.path())
        .output()
        .unwrap();
    let (page, errors) = (text(&shown.stdout), text(&shown.stderr));
    assert!(page.contains("/videos/generate"), "{page}\n{errors}");
    assert!(!errors.contains("Content Security Policy"), "{errors}");
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What the page does; it tells its one outcome to whom it came from.
const SCRIPT: &str = r#"
const tell = (text) => fetch("/outcome?" + encodeURIComponent(text));
const video = document.querySelector("video");
let seeked = "not seeked";
video.onerror = () => tell(`error ${video.error.code}: ${video.error.message}`);
video.onloadedmetadata = () => { video.currentTime = video.duration - 0.5; };
video.onseeked = () => {
  seeked = "seeked";
  video.play().catch((error) => tell(String(error)));
};
video.onended = () => {
  const frames = video.getVideoPlaybackQuality().totalVideoFrames;
  const size = `${video.videoWidth}x${video.videoHeight} of ${Math.round(video.duration)} s`;
  tell(`${size}, ${seeked}, ${frames > 1 ? "played" : "no pictures"}`);
};
video.src = LINK;
"#;

fn rendered(directory: &Path) -> Rendered {
    let (width, height) = dimensions("480p", "16:9").unwrap();
    let spec = Spec {
        prompt: "A lighthouse in the storm, and a boat that comes home".to_owned(),
        seed: 7,
        duration_s: 2,
        width,
        height,
        frames_per_second: FRAMES_PER_SECOND,
        style: None,
    };
    render(&spec, directory, 2, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// A program's name, once it is known to be there.
fn installed(program: &str) -> &str {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).any(|path| path.join(program).is_file());
    assert!(found, "this test needs {program}, which is not installed: run scripts/setup-tests");
    program
}

/// A process that ends with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The real program, serving.
struct Server {
    address: String,
    _process: Killed,
}

impl Server {
    fn start(data_dir: &Path) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_t2m"))
            .arg("serve")
            .env_clear()
            .env("DEV_MODE", "true")
            .env("T2M_ENGINE", "none")
            .env("T2M_LISTEN", "127.0.0.1:0")
            .env("T2M_DATA_DIR", data_dir)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let process = Killed(process);
        let address = line.trim().strip_prefix("listening on ").expect("it says where it listens");
        Self { address: address.to_owned(), _process: process }
    }
}

/// Uploads the video and asks for a link to it.
fn signed_link(server: &str, video: &Path) -> String {
    let video = std::fs::read(video).unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let part = reqwest::multipart::Part::bytes(video).file_name("video.mp4");
        let form = reqwest::multipart::Form::new().part("file", part);
        let upload = client.post(format!("{server}/api/files/upload")).multipart(form);
        let stored: Value = upload.send().await.unwrap().json().await.unwrap();
        assert_eq!(stored["data"]["content_type"], "video/mp4", "{stored}");
        let id = stored["data"]["file_id"].as_str().unwrap();
        let link = client.post(format!("{server}/api/files/{id}/signed-url"));
        let link: Value = link.send().await.unwrap().json().await.unwrap();
        link["data"]["url"].as_str().unwrap().to_owned()
    })
}

/// Another origin than the server's, as the page of an app is: shows the video, hears how it went.
struct Page {
    address: String,
    outcome: mpsc::Receiver<String>,
}

impl Page {
    fn serve(link: &str) -> Self {
        let script = SCRIPT.replace("LINK", &Value::from(link).to_string());
        let html = format!("<!doctype html><video muted></video><script>{script}</script>");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/", listener.local_addr().unwrap());
        let (sender, outcome) = mpsc::channel();
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                // A browser opens connections that it may never use: none may block the next.
                let (html, sender) = (html.clone(), sender.clone());
                std::thread::spawn(move || answer(connection?, &html, &sender));
            }
        });
        Self { address, outcome }
    }
}

fn answer(
    mut connection: TcpStream,
    html: &str,
    sender: &mpsc::Sender<String>,
) -> std::io::Result<()> {
    let head: Vec<String> = BufReader::new(&connection)
        .lines()
        .take_while(|line| line.as_ref().is_ok_and(|line| !line.is_empty()))
        .collect::<Result<_, _>>()?;
    let path = head.first().and_then(|line| line.split(' ').nth(1)).unwrap_or_default();
    if let Some(text) = path.strip_prefix("/outcome?") {
        let text = percent_encoding::percent_decode_str(text).decode_utf8_lossy();
        // Nobody listens any more once the test has heard enough.
        let _ = sender.send(text.into_owned());
    }
    write!(
        connection,
        "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{html}",
        html.len()
    )
}
