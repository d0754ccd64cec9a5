//! A server of the S3 protocol that nobody here wrote (`moto`), on a free port, for as long as the
//! tests run.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use t2m::config::BlobStore;

/// A bucket of its own on a server of its own; both end when it is dropped.
pub struct S3 {
    process: Child,
    endpoint: String,
    /// `s3://bucket/prefix`
    pub url: String,
}

/// What a client is configured with.
const VARIABLES: [(&str, &str); 4] = [
    ("AWS_ACCESS_KEY_ID", "tests"),
    ("AWS_SECRET_ACCESS_KEY", "tests-secret"),
    ("AWS_REGION", "us-east-1"),
    ("AWS_ALLOW_HTTP", "true"),
];

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl S3 {
    pub async fn start() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
        let python = folder.join(".venv/bin/python");
        assert!(python.exists(), "{} is missing: run scripts/setup-tests", python.display());
        let mut process = Command::new(python)
            .arg(folder.join("s3-server.py"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("scripts/setup-tests has installed it");
        let stdout = process.stdout.take().expect("its output is piped");
        let endpoint = first_line(stdout).await;
        let bucket = format!("t2m-tests-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let made = reqwest::Client::new().put(format!("{endpoint}/{bucket}")).send().await;
        assert_eq!(made.expect("the S3 server answers").status(), 200);
        Self { process, endpoint, url: format!("s3://{bucket}/some/prefix") }
    }

    /// The environment that a server needs to use it.
    pub fn variables(&self) -> impl Iterator<Item = (&'static str, String)> {
        let endpoint = ("AWS_ENDPOINT_URL", self.endpoint.clone());
        let fixed = VARIABLES.iter().map(|(name, value)| (*name, (*value).to_owned()));
        fixed.chain([endpoint])
    }

    /// The store, for use in this process.
    pub fn store(&self) -> BlobStore {
        let BlobStore::S3 { bucket, prefix, .. } = BlobStore::parse(&self.url).expect("a url")
        else {
            panic!("{} is not of S3", self.url)
        };
        let aws = self.variables().map(|(name, value)| (name.to_owned(), value.into())).collect();
        BlobStore::S3 { bucket, prefix, aws }
    }
}

async fn first_line(stdout: std::process::ChildStdout) -> String {
    use std::io::BufRead;
    let reading = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        std::io::BufReader::new(stdout).read_line(&mut line).map(|_| line)
    });
    let line = tokio::time::timeout(Duration::from_secs(60), reading).await;
    let line = line.expect("the S3 server starts").unwrap().unwrap();
    assert!(line.starts_with("http://"), "the S3 server said {line:?}");
    line.trim().to_owned()
}
