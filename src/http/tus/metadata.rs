//! The header `Upload-Metadata`: what a client says of its upload, and what is told of it again.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::super::problem::Problem;
use super::super::upload::{MAX_FIELDS, MAX_METADATA_BYTES, MAX_NAME_BYTES, json_bytes};
use crate::views::FileRow;

/// As long as all that is kept can be in Base64, and a bound for what is held in memory of an open
/// upload.
const MAX_DESCRIBED_BYTES: usize = 2 * MAX_METADATA_BYTES;

/// `key base64,key base64`; a key may stand alone.
pub(super) fn pairs(described: &str) -> Result<Vec<(String, String)>, Problem> {
    if described.len() > MAX_DESCRIBED_BYTES {
        return Err(bad_metadata(&format!("must be at most {MAX_DESCRIBED_BYTES} bytes long")));
    }
    let mut pairs: Vec<(String, String)> = Vec::new();
    for pair in described.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once(' ').unwrap_or((pair, ""));
        let value = STANDARD.decode(value.trim()).ok();
        let value = value.and_then(|value| String::from_utf8(value).ok());
        let value = value.ok_or_else(|| bad_metadata("must be UTF-8 in Base64"))?;
        if key.len() > MAX_NAME_BYTES || pairs.iter().any(|(known, _)| known == key) {
            return Err(bad_metadata("must have each key once, of 128 bytes at most"));
        }
        pairs.push((key.to_owned(), value));
    }
    if pairs.len() > MAX_FIELDS {
        return Err(bad_metadata("has too many keys"));
    }
    let all = pairs.iter().map(|(key, value)| (key.clone(), value.as_str().into())).collect();
    match json_bytes(&all) <= MAX_METADATA_BYTES {
        true => Ok(pairs),
        false => {
            let words = format!("must be at most {MAX_METADATA_BYTES} bytes of JSON, decoded");
            Err(bad_metadata(&words))
        }
    }
}

/// The same of a file that is stored, as far as it still says; nothing of one that cannot have come
/// so, as its fields did not fit a header.
pub(super) fn described(file: &FileRow) -> Option<String> {
    let plain = |key: &str| key.bytes().all(|it| it.is_ascii_graphic() && it != b',');
    let known = [("filename", &file.filename), ("filetype", &file.content_type)];
    let known = known.into_iter().filter(|(key, _)| !file.metadata.contains_key(*key));
    let mut pairs: Vec<String> =
        known.map(|(key, value)| format!("{key} {}", STANDARD.encode(value))).collect();
    for (key, value) in &file.metadata {
        let value = value.as_str().filter(|_| plain(key))?;
        pairs.push(format!("{key} {}", STANDARD.encode(value)).trim_end().to_owned());
    }
    let described = pairs.join(",");
    (described.len() <= MAX_DESCRIBED_BYTES).then_some(described)
}

pub(super) fn bad_metadata(words: &str) -> Problem {
    Problem::field("Upload-Metadata", words)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use serde_json::json;
    use uuid::Uuid;

    use super::*;
    use crate::domain::ids::FileId;
    use crate::http::problem::Code;

    #[test]
    fn a_stored_file_is_described_as_its_upload_was() {
        let file = |metadata: serde_json::Value| FileRow {
            file_id: FileId(Uuid::nil()),
            user_id: "ada".to_owned().try_into().unwrap(),
            filename: "clip ü.bin".to_owned(),
            content_type: "video/mp4".to_owned(),
            size: 1,
            sha256: String::new(),
            metadata: metadata.as_object().unwrap().clone(),
            job_id: None,
            created_at: DateTime::UNIX_EPOCH,
            tier: None,
            position: 1,
        };
        let told = described(&file(json!({ "purpose": "test", "is_confidential": "" }))).unwrap();
        assert!(told.ends_with("is_confidential,purpose dGVzdA=="), "{told}");
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let expected = [
            pair("filename", "clip ü.bin"),
            pair("filetype", "video/mp4"),
            pair("is_confidential", ""),
            pair("purpose", "test"),
        ];
        assert_eq!(pairs(&told).unwrap(), expected);
        let told = described(&file(json!({ "filename": "other", "filetype": "" }))).unwrap();
        assert_eq!(pairs(&told).unwrap(), [pair("filename", "other"), pair("filetype", "")]);
        for unfit in [json!({ "a,b": "" }), json!({ "ü": "" }), json!({ "twice": ["a", "b"] })] {
            assert_eq!(described(&file(unfit)), None);
        }
        assert_eq!(described(&file(json!({ "long": "a".repeat(64 * 1024) }))), None);
    }

    #[test]
    fn metadata_is_pairs_of_a_key_and_its_value_in_base64() {
        let of = |text: &str| pairs(text).map_err(|problem| problem.code());
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(of(""), Ok(vec![]));
        let told = of("filename Li4vYS5wbmc=, is_confidential,mood w7w=");
        let expected =
            vec![pair("filename", "../a.png"), pair("is_confidential", ""), pair("mood", "ü")];
        assert_eq!(told, Ok(expected));
        for bad in ["a !", "a YQ==,a Yg==", "a /w==", "a YQ== YQ=="] {
            assert_eq!(of(bad), Err(Code::ValidationFailed), "{bad}");
        }
        // Escaped, a control character is six; and what is dropped again is bounded too.
        let valued = |byte: u8, bytes: usize| format!("a {}", STANDARD.encode(vec![byte; bytes]));
        assert!(of(&valued(b'a', 16 * 1024 - 8)).is_ok());
        assert_eq!(of(&valued(b'a', 16 * 1024 - 7)), Err(Code::ValidationFailed));
        assert_eq!(of(&valued(1, 16 * 1024 / 6)), Err(Code::ValidationFailed));
        assert_eq!(of(&",".repeat(32 * 1024 + 1)), Err(Code::ValidationFailed));
        let many: Vec<String> = (0..33).map(|n| format!("k{n}")).collect();
        assert_eq!(of(&many.join(",")), Err(Code::ValidationFailed));
    }
}
