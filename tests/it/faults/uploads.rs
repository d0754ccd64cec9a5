//! Files as clients send them, at once or in pieces, and whether a server has them still.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::multipart::{Form, Part};
use reqwest::{Method, RequestBuilder};
use serde_json::json;

use super::Dice;
use crate::server::{Answer, Server, try_ask};

/// In bytes.
const SMALLEST: usize = 1 << 10;
const LARGEST: usize = 64 << 10;

/// The same for the same seed.
pub fn bytes_of(seed: &str) -> Vec<u8> {
    // FNV-1a.
    let mixed = seed.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |mixed, byte| {
        (mixed ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut dice = Dice::of(mixed);
    let size = dice.between(SMALLEST, LARGEST + 1);
    let mut bytes = Vec::with_capacity(size + size_of::<u64>());
    while bytes.len() < size {
        bytes.extend_from_slice(&dice.roll().to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

/// A file at once; its name is its key too.
pub fn at_once(server: &Server, user: &str, name: &str, bytes: Vec<u8>) -> RequestBuilder {
    let part = Part::bytes(bytes).file_name(name.to_owned());
    let request = server.request_of(user, Method::POST, "files/upload");
    request.header("idempotency-key", name).multipart(Form::new().part("file", part))
}

/// An upload that goes on, and how many of its bytes are promised.
pub struct Acknowledged {
    location: String,
    offset: usize,
}

impl Acknowledged {
    /// Whether a server goes on from there, or from further on.
    pub async fn is_kept(&self, server: &Server, user: &str) -> bool {
        let answer = try_ask(tus(server, user, Method::HEAD, &self.location)).await;
        let is_kept = answer.as_ref().is_ok_and(|answer| {
            answer.status == 200 && offset_in(answer).is_some_and(|offset| offset >= self.offset)
        });
        if !is_kept {
            let said = answer.map(|answer| (answer.status, offset_in(&answer)));
            println!("{}: {} bytes were acknowledged, now {said:?}", self.location, self.offset);
        }
        is_kept
    }
}

/// The same file in two pieces; it goes on with what there is of it. The last answer: the file is
/// stored where that tells its id.
pub async fn in_pieces(
    server: &Server,
    user: &str,
    name: &str,
    bytes: &[u8],
    acknowledged: &mut Option<Acknowledged>,
) -> reqwest::Result<Answer> {
    let request = tus(server, user, Method::POST, "files/tus")
        .header("idempotency-key", name)
        .header("upload-length", bytes.len())
        .header("upload-metadata", format!("filename {}", STANDARD.encode(name)));
    let mut answer = try_ask(request).await?;
    let location = answer.header("location").replace(&server.address, "");
    // Two pieces, or a question after what is there already whole.
    for _ in 0..2 {
        if answer.status >= 300 || !answer.header("x-file-id").is_empty() {
            break;
        }
        let offset = offset_in(&answer).expect("the answer tells the offset");
        let before = acknowledged.as_ref().map_or(0, |it| it.offset);
        assert!(offset >= before, "{name}: {offset} bytes, and {before} were acknowledged");
        *acknowledged = Some(Acknowledged { location: location.clone(), offset });
        let end = bytes.len().min(offset + bytes.len().div_ceil(2));
        let request = match offset == bytes.len() {
            true => tus(server, user, Method::HEAD, &location),
            false => tus(server, user, Method::PATCH, &location)
                .header("upload-offset", offset)
                .header("content-type", "application/offset+octet-stream")
                .body(bytes[offset..end].to_vec()),
        };
        answer = try_ask(request).await?;
    }
    Ok(answer)
}

/// Whether a server gives all of a file's bytes back.
pub async fn is_there(server: &Server, user: &str, file_id: &str, bytes: &[u8]) -> bool {
    let link = server.post(user, &format!("files/{file_id}/signed-url"), &json!({})).await;
    let Some(url) = link.body["data"]["url"].as_str() else {
        println!("{file_id}: there is no link to it, {}", link.body);
        return false;
    };
    let path = url.replace(&server.address, "");
    // One that is cut short may break the answer off.
    let file = try_ask(server.request(Method::GET, &path)).await;
    let is_there = file.as_ref().is_ok_and(|file| file.status == 200 && file.bytes == bytes);
    if !is_there {
        let said = file.map(|file| (file.status, file.bytes.len(), file.body));
        println!("{file_id}: {} bytes were acknowledged, now {said:?}", bytes.len());
    }
    is_there
}

fn tus(server: &Server, user: &str, method: Method, path: &str) -> RequestBuilder {
    server.request_of(user, method, path).header("tus-resumable", "1.0.0")
}

fn offset_in(answer: &Answer) -> Option<usize> {
    answer.header("upload-offset").parse().ok()
}
