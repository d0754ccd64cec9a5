use super::*;
use clap::Parser;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    options: Options,
}

fn check(arguments: &[&str], naming: &[&str]) {
    let cli = Cli::parse_from([&["t2m"], arguments].concat());
    let (_, faults) = cli.options.check();
    assert_eq!(faults.len(), naming.len(), "{faults:?}");
    for (fault, variable) in faults.iter().zip(naming) {
        assert!(fault.starts_with(variable), "{fault} should name {variable}");
    }
}

#[test]
fn a_secret_is_not_printed() {
    let options = Cli::parse_from(["t2m", "--clerk-secret-key", "sk_test_hidden"]).options;
    assert!(!format!("{options:?}").contains("hidden"));
    let backend = options.backend.check().unwrap();
    assert!(!format!("{backend:?}").contains("hidden"));
    assert_eq!(backend.unwrap().secret_key.reveal(), "sk_test_hidden");
}

#[test]
fn development_needs_no_configuration() {
    check(&[], &[]);
}

#[test]
fn a_port_alone_is_of_this_machine() {
    let address = |text| listen_address(text).map(|address| address.to_string());
    assert_eq!(address(":0").as_deref(), Ok("127.0.0.1:0"));
    assert_eq!(address(" ").as_deref(), Ok(LISTEN));
    assert_eq!(address("[::1]:8080").as_deref(), Ok("[::1]:8080"));
    assert_eq!(address("0.0.0.0:1").as_deref(), Ok("0.0.0.0:1"));
    assert!(address("localhost:81").unwrap().ends_with(":81"));
    for bad in ["127.0.0.1", "8080", ":x", ":65536"] {
        assert!(address(bad).is_err(), "{bad}");
    }
}

#[test]
fn every_fault_is_named_at_once() {
    check(
        &["--environment", "production", "--dev-mode", "true"],
        &["DEV_MODE", "CLERK_ISSUER", "FILE_SIGNING_SECRET"],
    );
    check(&["--clerk-issuer", "nonsense"], &["CLERK_ISSUER"]);
    check(&["--clerk-secret-key", "pk_test_x"], &["CLERK_SECRET_KEY"]);
    check(
        &["--clerk-secret-key", "sk_test\nx", "--clerk-api-url", "x"],
        &["CLERK_SECRET_KEY", "CLERK_API_URL"],
    );
    check(&["--clerk-api-url", "http://api.clerk.com"], &["CLERK_API_URL"]);
    check(&["--clerk-secret-key", "sk_x", "--clerk-api-url", "http://127.0.0.1:9"], &[]);
    check(&["--clerk-secret-key", ""], &[]);
    for bad in ["127.0.0.1:4318", "collector", "http://", "http://a b", "ftp://a/", "/v1"] {
        check(&["--otlp-endpoint", bad], &["OTEL_EXPORTER_OTLP_ENDPOINT"]);
    }
    for good in ["", " ", "http://127.0.0.1:4318", "https://u:p@collector.example/otlp/"] {
        check(&["--otlp-endpoint", good], &[]);
    }
    check(&["--callback-retry-schedule", "5s,soon"], &["CALLBACK_RETRY_SCHEDULE"]);
    check(&["--worker-tokens", "of two words"], &["T2M_WORKER_TOKENS"]);
    check(&["--worker-tokens", "short"], &[]);
    let production = ["--environment", "production", "--clerk-issuer", "https://a.example"];
    let production = [&production[..], &["--file-signing-secret", "x"]].concat();
    let tokens = format!("{0},{0} ", "t".repeat(24));
    check(&[&production[..], &["--worker-tokens", &tokens]].concat(), &[]);
    let short = [&production[..], &["--worker-tokens", "short"]].concat();
    check(&short, &["T2M_WORKER_TOKENS"]);
    check(&["--allowed-origins", "https://a.example/,b"], &["ALLOWED_ORIGINS"; 2]);
    for never_sent in [
        "HTTPS://a.example",
        "https://a.example:443",
        "https://u@a.example",
        "https://a.example/app",
        "https://bücher.example",
        "null",
    ] {
        check(&["--allowed-origins", never_sent], &["ALLOWED_ORIGINS"]);
    }
    check(&["--log", "postgres://u:p@h/d", "--engine", "magic"], &["T2M_ENGINE"]);
}

#[test]
fn a_program_ends_before_its_attempt_does() {
    check(&["--engine-time-limit", "59m 59s"], &[]);
    for bad in ["0s", "60m", "1day"] {
        check(&["--engine-time-limit", bad], &["T2M_ENGINE_TIME_LIMIT"]);
    }
    assert_eq!(crate::domain::job::LONGEST_ATTEMPT.to_std(), Ok(engine::LONGEST_TIME));
}
