//! The body of a piece. It breaks off also when the server stops, in time for what has come to be
//! noted and answered.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use actix_web::error::PayloadError;
use actix_web::web::{Bytes, Payload};
use futures_util::{Stream, stream};
use serde_json::json;
use tokio::sync::watch;

use super::super::app::STOP_WITHIN;
use super::super::body::{payload_problem, unstalled};
use super::super::problem::{Code, Problem};

/// Until then after the word to stop a body may come to its own end.
const LATEST: Duration = STOP_WITHIN.saturating_sub(Duration::from_secs(2));

pub(super) type Body = Pin<Box<dyn Stream<Item = Result<Bytes, Broken>>>>;

/// Why a body broke off.
#[derive(Debug)]
pub(super) enum Broken {
    Payload(PayloadError),
    Stopping,
}

impl From<Broken> for Problem {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Payload(error) => payload_problem(error),
            Broken::Stopping => Self::new(Code::NotReady)
                .with_sentence("The server is stopping: go on with the upload in a moment")
                .with_detail(json!({ "reason": "the server is stopping" }))
                .retry_after(1),
        }
    }
}

/// Not to be asked again after it broke off.
pub(super) fn body(
    payload: Payload,
    silence: Duration,
    mut stopping: watch::Receiver<bool>,
) -> Body {
    let mut payload = Box::pin(unstalled(payload, silence));
    let mut latest = Box::pin(async move {
        if stopping.wait_for(|stopping| *stopping).await.is_err() {
            // There is nobody to say so.
            std::future::pending().await
        }
        tokio::time::sleep(LATEST).await;
    });
    Box::pin(stream::poll_fn(move |context: &mut Context<'_>| {
        if latest.as_mut().poll(context).is_ready() {
            return Poll::Ready(Some(Err(Broken::Stopping)));
        }
        payload.as_mut().poll_next(context).map_err(Broken::Payload)
    }))
}
