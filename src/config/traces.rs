//! Where traces go, of a server and of a worker.

use clap::Args;
use url::Url;

use super::present;

/// The option about traces.
#[derive(Debug, Clone, Args)]
pub struct TraceOptions {
    /// An OpenTelemetry collector that takes traces by OTLP over HTTP, such as
    /// `http://127.0.0.1:4318`
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,
}

impl TraceOptions {
    /// The collector, if there is one; what is wrong is added to the faults, naming its variable.
    pub fn check(self, faults: &mut Vec<String>) -> Option<String> {
        let collector = present(self.otlp_endpoint)?;
        if is_collector(&collector) {
            return Some(collector);
        }
        faults.push("OTEL_EXPORTER_OTLP_ENDPOINT: not an http or https URL".to_owned());
        None
    }
}

/// As who sends the traces reads it, and will not repair it.
fn is_collector(text: &str) -> bool {
    let scheme = Url::parse(text).ok().filter(Url::has_host);
    scheme.is_some_and(|url| matches!(url.scheme(), "http" | "https"))
        && text.parse::<actix_web::http::Uri>().is_ok_and(|uri| uri.host().is_some())
}
