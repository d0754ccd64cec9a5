//! Reading request bodies without trusting the sender: bounded in size and in silence, which
//! actix-web alone is not (a stalled body holds its connection for ever).

use std::{io, time::Duration};

use actix_web::{
    HttpRequest,
    error::PayloadError,
    http::header,
    web::{self, Bytes, BytesMut},
};
use futures_util::{Stream, StreamExt, stream};

use super::problem::{Code, Problem};

/// How long and how large a body may be. Put another one into the app's data for other limits.
#[derive(Debug, Clone, Copy)]
pub struct BodyLimits {
    /// The longest time between two chunks.
    pub silence: Duration,
    /// The longest time for a whole JSON body; a byte every few seconds is no body either.
    pub whole: Duration,
    /// The largest JSON body, in bytes.
    pub json_bytes: usize,
}

impl BodyLimits {
    /// 10 s of silence, 60 s and 256 KiB for a whole JSON body.
    pub const DEFAULT: Self = Self {
        silence: Duration::from_secs(10),
        whole: Duration::from_secs(60),
        json_bytes: 256 * 1024,
    };

    /// Those of the app, else the default.
    pub fn of(req: &HttpRequest) -> Self {
        req.app_data::<web::Data<Self>>().map_or(Self::DEFAULT, |limits| *limits.as_ref())
    }
}

/// The body, cut off with an I/O error of kind `TimedOut` once its sender is silent too long.
pub fn unstalled<S>(
    body: S,
    silence: Duration,
) -> impl Stream<Item = Result<Bytes, PayloadError>> + 'static
where
    S: Stream<Item = Result<Bytes, PayloadError>> + Unpin + 'static,
{
    stream::unfold(Some(body), move |body| async move {
        let mut body = body?;
        match tokio::time::timeout(silence, body.next()).await {
            Ok(chunk) => chunk.map(|chunk| (chunk, Some(body))),
            Err(_) => Some((Err(PayloadError::Io(io::ErrorKind::TimedOut.into())), None)),
        }
    })
    // Multipart asks again after the end.
    .fuse()
}

/// Reads a small body whole.
pub async fn read_whole(
    declared: Option<u64>,
    body: impl Stream<Item = Result<Bytes, PayloadError>> + Unpin + 'static,
    limits: BodyLimits,
) -> Result<Bytes, Problem> {
    let reading = async {
        if declared.is_some_and(|length| length > limits.json_bytes as u64) {
            return Err(too_large(limits.json_bytes as u64));
        }
        let mut body = std::pin::pin!(unstalled(body, limits.silence));
        let mut whole = BytesMut::new();
        while let Some(chunk) = body.next().await {
            whole.extend_from_slice(&chunk.map_err(payload_problem)?);
            if whole.len() > limits.json_bytes {
                return Err(too_large(limits.json_bytes as u64));
            }
        }
        Ok(whole.freeze())
    };
    match tokio::time::timeout(limits.whole, reading).await {
        Ok(read) => read,
        Err(_) => Err(Problem::new(Code::RequestTimeout)),
    }
}

/// The `Content-Length`, if there is one; actix refuses a malformed one itself.
pub fn declared_length(req: &HttpRequest) -> Option<u64> {
    req.headers().get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// 413, with the limit in bytes.
pub fn too_large(limit_bytes: u64) -> Problem {
    Problem::new(Code::PayloadTooLarge)
        .with_sentence(format!("The request body is larger than {limit_bytes} bytes"))
        .with_detail(serde_json::json!({ "limit_bytes": limit_bytes }))
}

/// What a body that broke off means to the caller, if one is still there.
pub fn payload_problem(error: PayloadError) -> Problem {
    let code = match &error {
        PayloadError::Io(io) if io.kind() == io::ErrorKind::TimedOut => Code::RequestTimeout,
        PayloadError::Overflow => Code::PayloadTooLarge,
        _ => Code::MalformedRequest,
    };
    Problem::new(code).caused_by(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: BodyLimits = BodyLimits {
        silence: Duration::from_secs(10),
        whole: Duration::from_secs(60),
        json_bytes: 8,
    };

    type Chunk = Result<Bytes, PayloadError>;

    fn chunk(text: &'static str) -> Chunk {
        Ok(Bytes::from_static(text.as_bytes()))
    }

    async fn code(body: impl Stream<Item = Chunk> + Unpin + 'static) -> Result<Bytes, Code> {
        read_whole(None, body, QUICK).await.map_err(|problem| problem.code())
    }

    #[tokio::test]
    async fn a_body_within_its_limits_is_whole() {
        let body = stream::iter([chunk("1234"), chunk("5678")]);
        assert_eq!(code(body).await.unwrap(), "12345678");
    }

    #[tokio::test]
    async fn one_byte_more_is_too_large() {
        assert_eq!(code(stream::iter([chunk("123456789")])).await, Err(Code::PayloadTooLarge));
        let declared = read_whole(Some(9), stream::pending(), QUICK).await;
        assert_eq!(declared.unwrap_err().code(), Code::PayloadTooLarge);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_cut_off() {
        let began = tokio::time::Instant::now();
        let body = stream::iter([chunk("1")]).chain(stream::pending());
        assert_eq!(code(body).await, Err(Code::RequestTimeout));
        assert_eq!(began.elapsed(), QUICK.silence);
    }

    #[tokio::test(start_paused = true)]
    async fn a_trickle_is_cut_off_too() {
        let began = tokio::time::Instant::now();
        let body = stream::repeat(()).then(|()| async {
            tokio::time::sleep(Duration::from_secs(9)).await;
            chunk("1")
        });
        assert_eq!(code(Box::pin(body)).await, Err(Code::RequestTimeout));
        assert_eq!(began.elapsed(), QUICK.whole);
    }

    #[tokio::test]
    async fn a_body_broken_off_is_malformed() {
        let body = stream::iter([chunk("1"), Err(PayloadError::Incomplete(None))]);
        assert_eq!(code(body).await, Err(Code::MalformedRequest));
    }
}
