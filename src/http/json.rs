//! JSON bodies, read field by field: what is wrong is said per field and in plain words, never in
//! serde's (which leak the names and shapes of our types).

use std::{future::Future, ops::RangeInclusive, pin::Pin};

use actix_web::{
    FromRequest, HttpRequest,
    dev::Payload,
    http::header::{self, HeaderMap},
    web::Bytes,
};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{
    body::{BodyLimits, declared_length, read_whole},
    problem::{Code, Problem},
};

/// A type that is read from a JSON object. Values of refused fields are placeholders: nobody sees
/// them, because the request is answered with 422.
pub trait FromFields: Sized {
    /// The largest body in bytes, for a type whose bodies are large; absent is everybody's limit.
    const LARGEST: Option<usize> = None;

    /// Reads each field; unknown ones are ignored.
    fn from_fields(fields: &mut Fields) -> Self;
}

/// A required JSON body (CONTRACT.md §2: 400, 413, 415, 422).
#[derive(Debug)]
pub struct Json<T>(pub T);

/// A JSON body that may be left out; then every field is absent.
#[derive(Debug)]
pub struct OptionalJson<T>(pub T);

type Extracting<T> = Pin<Box<dyn Future<Output = Result<T, Problem>>>>;

impl<T: FromFields + 'static> FromRequest for Json<T> {
    type Error = Problem;
    type Future = Extracting<Self>;

    fn from_request(req: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let reading = read(req, payload, T::LARGEST);
        Box::pin(async move {
            let bytes = reading.await?.ok_or_else(|| Problem::new(Code::MissingBody))?;
            parse(&bytes).map(Json)
        })
    }
}

impl<T: FromFields + 'static> FromRequest for OptionalJson<T> {
    type Error = Problem;
    type Future = Extracting<Self>;

    fn from_request(req: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let reading = read(req, payload, T::LARGEST);
        Box::pin(async move {
            let bytes = reading.await?.unwrap_or_else(|| Bytes::from_static(b"{}"));
            parse(&bytes).map(OptionalJson)
        })
    }
}

/// Reads a body already in memory; for extractors that need its raw bytes too.
pub fn parse<T: FromFields>(bytes: &[u8]) -> Result<T, Problem> {
    let value: Value = serde_json::from_slice(bytes).map_err(invalid_json)?;
    let Value::Object(values) = value else {
        return Err(Problem::field("body", "must be a JSON object"));
    };
    let mut fields = Fields::new(values);
    let parsed = T::from_fields(&mut fields);
    match fields.errors.is_empty() {
        true => Ok(parsed),
        false => Err(Problem::fields(fields.errors)),
    }
}

fn invalid_json(error: serde_json::Error) -> Problem {
    Problem::new(Code::InvalidJson)
        .with_detail(json!({ "line": error.line(), "column": error.column() }))
        .caused_by(error)
}

/// The body, or nothing if it is empty.
fn read(
    req: &HttpRequest,
    payload: &mut Payload,
    largest: Option<usize>,
) -> Extracting<Option<Bytes>> {
    let json = is_json(req.headers());
    let (mut limits, declared) = (BodyLimits::of(req), declared_length(req));
    limits.json_bytes = largest.unwrap_or(limits.json_bytes);
    let payload = payload.take();
    Box::pin(async move {
        let bytes = read_whole(declared, payload, limits).await?;
        match bytes.is_empty() {
            true => Ok(None),
            false if json => Ok(Some(bytes)),
            false => Err(Problem::new(Code::UnsupportedMediaType)
                .with_sentence("Send the body as application/json")),
        }
    })
}

fn is_json(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let plain = text(header::CONTENT_ENCODING).is_none_or(|it| it.eq_ignore_ascii_case("identity"));
    let mime: Option<mime::Mime> = text(header::CONTENT_TYPE).and_then(|it| it.parse().ok());
    plain && mime.is_some_and(|mime| mime.essence_str() == "application/json")
}

/// A JSON object being read, and what was wrong with it so far. `null` counts as absent.
#[derive(Debug)]
pub struct Fields {
    values: Map<String, Value>,
    errors: Map<String, Value>,
    /// Kept when it is not values that are wanted, but what is asked of them.
    demands: Option<Demands>,
}

/// What is asked of a body's fields, in the words of JSON Schema.
#[derive(Debug, Default)]
pub struct Demands {
    /// By the field's name.
    pub fields: Map<String, Value>,
    /// Other spellings, each with the name that it stands for.
    pub spellings: Vec<(String, String)>,
}

/// What a type asks of its fields, told by the very code that reads them: so the OpenAPI document
/// cannot say anything else.
pub fn demands<T: FromFields>() -> Demands {
    let mut fields = Fields { demands: Some(Demands::default()), ..Fields::new(Map::new()) };
    T::from_fields(&mut fields);
    fields.demands.unwrap_or_default()
}

impl Fields {
    fn new(values: Map<String, Value>) -> Self {
        Self { values, errors: Map::new(), demands: None }
    }

    fn demand(&mut self, name: &str, words: impl FnOnce() -> Value) {
        if let Some(demands) = &mut self.demands {
            demands.fields.insert(name.to_owned(), words());
        }
    }

    /// Accepts `other` (e.g. `expiresIn`) as another spelling of `name`, which wins.
    pub fn alias(&mut self, other: &str, name: &str) {
        if let Some(demands) = &mut self.demands {
            demands.spellings.push((other.to_owned(), name.to_owned()));
        }
        if let Some(value) = self.values.remove(other) {
            self.values.entry(name).or_insert(value);
        }
    }

    /// Whether a field is there and `null`, for the few of which that means something.
    pub fn is_null(&self, name: &str) -> bool {
        self.values.get(name).is_some_and(Value::is_null)
    }

    /// Refuses a field in words that follow its name: "must be …". The first refusal stands.
    pub fn refuse(&mut self, name: &str, words: impl Into<String>) {
        self.errors.entry(name).or_insert_with(|| Value::String(words.into()));
    }

    /// A string of so many characters.
    pub fn text(&mut self, name: &str, characters: RangeInclusive<usize>) -> String {
        let text = self.optional_text(name, characters);
        self.required(name, text)
    }

    /// A string of so many characters, or absent.
    pub fn optional_text(
        &mut self,
        name: &str,
        characters: RangeInclusive<usize>,
    ) -> Option<String> {
        self.demand(name, || of_length(&characters));
        let text = self.take(name, "must be a string", |value| match value {
            Value::String(text) => Some(text),
            _ => None,
        })?;
        let (least, most) = characters.clone().into_inner();
        let words = format!("must be {least} to {most} characters long");
        self.accept(name, characters.contains(&text.chars().count()), words).then_some(text)
    }

    /// A whole number within a range.
    pub fn u64(&mut self, name: &str, range: RangeInclusive<u64>) -> u64 {
        let number = self.optional_u64(name, range);
        self.required(name, number)
    }

    /// A whole number within a range, or absent. `5.0` is one: JSON has a single kind of number.
    pub fn optional_u64(&mut self, name: &str, range: RangeInclusive<u64>) -> Option<u64> {
        self.demand(name, || json!({ "minimum": range.start(), "maximum": range.end() }));
        let words = format!("must be a whole number from {} to {}", range.start(), range.end());
        self.take(name, &words, |value| whole(&value).filter(|number| range.contains(number)))
    }

    /// A number within a range, or absent.
    pub fn optional_f64(&mut self, name: &str, range: RangeInclusive<f64>) -> Option<f64> {
        self.demand(name, || json!({ "minimum": range.start(), "maximum": range.end() }));
        let words = format!("must be a number from {} to {}", range.start(), range.end());
        self.take(name, &words, |value| value.as_f64().filter(|number| range.contains(number)))
    }

    /// One of a few words.
    pub fn choice(&mut self, name: &str, choices: &[&'static str]) -> &'static str {
        let choice = self.optional_choice(name, choices);
        self.required(name, choice)
    }

    /// One of a few words, or absent.
    pub fn optional_choice(
        &mut self,
        name: &str,
        choices: &[&'static str],
    ) -> Option<&'static str> {
        self.demand(name, || json!({ "enum": choices }));
        let words = format!("must be one of {}", choices.join(", "));
        self.take(name, &words, |value| {
            choices.iter().copied().find(|choice| value.as_str() == Some(choice))
        })
    }

    /// A UUID, or absent.
    pub fn optional_uuid(&mut self, name: &str) -> Option<Uuid> {
        self.take(name, "must be a UUID", |value| Uuid::try_parse(value.as_str()?).ok())
    }

    /// `true` or `false`.
    pub fn bool(&mut self, name: &str) -> bool {
        let flag = self.optional_bool(name);
        self.required(name, flag)
    }

    /// `true` or `false`, or absent.
    pub fn optional_bool(&mut self, name: &str) -> Option<bool> {
        self.take(name, "must be true or false", |value| value.as_bool())
    }

    /// An object that is kept as it is, or absent.
    pub fn optional_map(&mut self, name: &str) -> Option<Map<String, Value>> {
        self.take(name, "must be an object", |value| match value {
            Value::Object(map) => Some(map),
            _ => None,
        })
    }

    /// A list of strings, or absent; the lengths are of the list and of each string.
    pub fn optional_texts(
        &mut self,
        name: &str,
        length: RangeInclusive<usize>,
        characters: RangeInclusive<usize>,
    ) -> Option<Vec<String>> {
        let items = self.list(name, length, || of_length(&characters))?;
        let words = format!(
            "must be a list of strings of {} to {} characters each",
            characters.start(),
            characters.end()
        );
        let fits = |text: &str| characters.contains(&text.chars().count());
        let text = |item: Value| item.as_str().filter(|text| fits(text)).map(str::to_owned);
        let texts: Option<Vec<String>> = items.into_iter().map(text).collect();
        self.accept(name, texts.is_some(), words);
        texts
    }

    /// A list of whole numbers from 0 on, or absent.
    pub fn optional_numbers(
        &mut self,
        name: &str,
        length: RangeInclusive<usize>,
    ) -> Option<Vec<u64>> {
        let items = self.list(name, length, || json!({ "minimum": 0 }))?;
        let numbers: Option<Vec<u64>> = items.iter().map(whole).collect();
        self.accept(name, numbers.is_some(), "must be a list of whole numbers".to_owned());
        numbers
    }

    /// A list of objects, each read in the same way; refusals are named `jobs[3].prompt`.
    pub fn objects<T: FromFields>(&mut self, name: &str, length: RangeInclusive<usize>) -> Vec<T> {
        let items = self.list(name, length, || json!({}));
        let items = self.required(name, items);
        let mut parsed = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            let Value::Object(values) = item else {
                self.refuse(&format!("{name}[{index}]"), "must be an object");
                continue;
            };
            let mut inner = Fields::new(values);
            parsed.push(T::from_fields(&mut inner));
            for (field, words) in inner.errors {
                self.errors.insert(format!("{name}[{index}].{field}"), words);
            }
        }
        parsed
    }

    fn list(
        &mut self,
        name: &str,
        length: RangeInclusive<usize>,
        items: impl FnOnce() -> Value,
    ) -> Option<Vec<Value>> {
        let (least, most) = (length.start(), length.end());
        self.demand(name, || json!({ "minItems": least, "maxItems": most, "items": items() }));
        let words = format!("must be a list of {} to {} items", length.start(), length.end());
        self.take(name, &words, |value| match value {
            Value::Array(items) if length.contains(&items.len()) => Some(items),
            _ => None,
        })
    }

    fn take<T>(
        &mut self,
        name: &str,
        words: &str,
        read: impl FnOnce(Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.values.remove(name).filter(|value| !value.is_null())?;
        let read = read(value);
        self.accept(name, read.is_some(), words.to_owned());
        read
    }

    fn accept(&mut self, name: &str, good: bool, words: String) -> bool {
        if !good {
            self.refuse(name, words);
        }
        good
    }

    fn required<T: Default>(&mut self, name: &str, value: Option<T>) -> T {
        value.unwrap_or_else(|| {
            // An earlier, more exact refusal stands.
            self.refuse(name, "is required");
            T::default()
        })
    }
}

fn of_length(characters: &RangeInclusive<usize>) -> Value {
    json!({ "minLength": characters.start(), "maxLength": characters.end() })
}

fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        let number = value.as_f64()?;
        // Up to 2^53 every whole f64 is exact.
        (number.fract() == 0.0 && (0.0..=9_007_199_254_740_992.0).contains(&number))
            .then_some(number as u64)
    })
}

#[cfg(test)]
#[path = "json_tests.rs"]
mod tests;
