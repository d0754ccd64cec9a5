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

use super::super::body::{payload_problem, unstalled};
use super::super::problem::{Code, Problem};

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
    mut last_pieces: watch::Receiver<bool>,
) -> Body {
    let mut payload = Box::pin(unstalled(payload, silence));
    let mut latest = Box::pin(async move {
        if last_pieces.wait_for(|is_time| *is_time).await.is_err() {
            // There is nobody to say so.
            std::future::pending::<()>().await;
        }
    });
    Box::pin(stream::poll_fn(move |context: &mut Context<'_>| {
        if latest.as_mut().poll(context).is_ready() {
            return Poll::Ready(Some(Err(Broken::Stopping)));
        }
        payload.as_mut().poll_next(context).map_err(Broken::Payload)
    }))
}
