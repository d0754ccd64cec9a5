//! Where log lines and traces go.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::Context;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::config::LogFormat;

/// How long what is left may take to be sent, unless somebody says by when.
const LAST_TRACES: Duration = Duration::from_secs(5);
/// What a server or a worker says. What the libraries of the traces cannot send is told, and nothing
/// else of them; nor that there is nothing to fill in a path of a letter.
const SERVICES: &str = "info,opentelemetry=warn,tiny_skia=error";
/// What a command of an operator says besides what it prints.
const COMMANDS: &str = "off,t2m=warn";

/// Sends what is left when it is dropped.
pub struct Telemetry {
    traces: Option<SdkTracerProvider>,
    by: Option<Instant>,
}

impl Telemetry {
    /// The same by then at the latest.
    pub fn end_by(mut self, by: Instant) {
        self.by = Some(by);
    }
}

/// Log lines to stderr, as text or as JSON, filtered by `RUST_LOG`; traces of this service by OTLP over
/// HTTP if there is a collector. Not within a runtime: who sends the traces has one of its own.
///
/// # Errors
/// The collector's address is none, or there is a subscriber already.
pub fn init(
    service: &'static str,
    format: LogFormat,
    collector: Option<&str>,
) -> anyhow::Result<Telemetry> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(SERVICES));
    let lines = lines(format);
    let provider = collector.map(|collector| provider(service, collector)).transpose()?;
    let traces = provider.as_ref().map(|provider| {
        opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("t2m"))
            // Our own spans; what libraries say at this level is no part of a request's way.
            .with_filter(EnvFilter::new("off,t2m=info"))
    });
    tracing_subscriber::registry()
        .with(traces)
        .with(lines.with_filter(filter))
        .try_init()
        .context("setting up the log lines")?;
    Ok(Telemetry { traces: provider, by: None })
}

fn lines<S>(format: LogFormat) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    }
}

/// A line to stderr for what shared code warns of, which commands do not print themselves.
pub fn warn_alone() {
    let lines = tracing_subscriber::fmt().with_env_filter(COMMANDS).with_writer(std::io::stderr);
    lines.with_ansi(std::io::stderr().is_terminal()).without_time().init();
}

fn provider(service: &'static str, endpoint: &str) -> anyhow::Result<SdkTracerProvider> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
        .build()
        .context("preparing to send traces to OTEL_EXPORTER_OTLP_ENDPOINT")?;
    let resource = match std::env::var_os("OTEL_SERVICE_NAME").filter(|name| !name.is_empty()) {
        Some(_) => Resource::builder().build(),
        None => Resource::builder().with_service_name(service).build(),
    };
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        let left = |by: Instant| by.saturating_duration_since(Instant::now());
        if let Some(provider) = self.traces.take()
            && let Err(error) = provider.shutdown_with_timeout(self.by.map_or(LAST_TRACES, left))
        {
            eprintln!("t2m: the last traces could not be sent: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::Tracer;
    use opentelemetry_sdk::error::OTelSdkResult;
    use opentelemetry_sdk::trace::{SpanData, SpanExporter};

    use super::*;

    /// A collector that never answers.
    #[derive(Debug)]
    struct Silent;

    impl SpanExporter for Silent {
        async fn export(&self, _: Vec<SpanData>) -> OTelSdkResult {
            std::future::pending().await
        }
    }

    #[test]
    fn traces_that_nobody_takes_hold_up_no_stop() {
        let traces = SdkTracerProvider::builder().with_batch_exporter(Silent).build();
        drop(traces.tracer("t2m").start("a request"));
        let began = Instant::now();
        Telemetry { traces: Some(traces), by: None }.end_by(began);
        assert!(began.elapsed() < LAST_TRACES, "{:?}", began.elapsed());
    }
}
