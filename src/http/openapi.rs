//! The OpenAPI document, made from the route table, and the page that shows it.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use actix_web::HttpResponse;
use actix_web::http::Method;
use actix_web::web::{Bytes, ServiceConfig};
use serde_json::json;
use utoipa::openapi::path::{
    HttpMethod, OperationBuilder, Parameter, ParameterBuilder, ParameterIn, PathItem,
};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{
    ArrayBuilder, KnownFormat, Object, ObjectBuilder, SchemaFormat, SchemaType, Type,
};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ContentBuilder, OpenApi, Ref, RefOr, Required, ResponseBuilder, Schema, ServerBuilder,
};
use utoipa::{IntoParams, OpenApi as _, ToSchema};
use utoipa_swagger_ui::SwaggerUi;

use super::admin::{AccessRequest, FlagsRequest, OrganizationRequest};
use super::analytics::AnalyticsAnswer;
use super::app::PREFIXES;
use super::batch::{BatchAnswer, BatchRequest};
use super::callbacks::CallbacksAnswer;
use super::dead_letters::LetterDiscarded;
use super::files::{FileAnswer, FileDeleted, UploadAnswer, UploadForm};
use super::health::{Health, Readiness};
use super::jobs::{JobAnswer, VideoRequest};
use super::links::{LinkAnswer, LinkRequest};
use super::lists::PageParameters;
use super::me::{ClaimsAnswer, MeAnswer, OnboardingAnswer, OnboardingRequest};
use super::operations::SystemAnswer;
use super::replay::{ReplayAnswer, ReplayRequest};
use super::routes::{Access, Body, Route, table};
use super::sessions::{Remember, SessionAnswer, SessionEnded};
use super::translations::TranslationForm;
use super::webhooks::{Acknowledged, Delivery};
use super::worker::{
    CompleteRequest, FailRequest, HandedAnswer, LeaseAnswer, LeaseRequest, OutcomeAnswer,
    ProgressRequest, ReportAnswer,
};
use crate::actors::dead_letters::Heading;
use crate::actors::rebuild::Status;
use crate::actors::records::Envelope;
use crate::views::UserRow;

mod bounds;

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "T2M",
        description = "The back end of text-to-media apps on Clerk. Success is \
            `{\"success\":true,\"data\":…}`, failure `{\"success\":false,\"error\",\"message\",\"code\",\"detail\"}`."
    ),
    components(schemas(
        AccessRequest,
        Acknowledged,
        ReplayRequest,
        AnalyticsAnswer,
        SystemAnswer,
        BatchAnswer,
        BatchRequest,
        CallbacksAnswer,
        ClaimsAnswer,
        CompleteRequest,
        Delivery,
        Envelope,
        FailRequest,
        FileAnswer,
        FileDeleted,
        FlagsRequest,
        HandedAnswer,
        Heading,
        Health,
        JobAnswer,
        LeaseAnswer,
        LeaseRequest,
        LetterDiscarded,
        TranslationForm,
        LinkAnswer,
        LinkRequest,
        MeAnswer,
        OnboardingAnswer,
        OnboardingRequest,
        OrganizationRequest,
        OutcomeAnswer,
        Problem,
        ProgressRequest,
        Readiness,
        Remember,
        ReplayAnswer,
        ReportAnswer,
        SessionAnswer,
        SessionEnded,
        Status,
        UploadAnswer,
        UploadForm,
        UserRow,
        VideoRequest
    ))
)]
struct Base;

/// Every refusal.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only its schema is used")]
struct Problem {
    #[schema(example = false)]
    success: bool,
    error: String,
    message: String,
    /// Stable; what a client branches on.
    code: String,
    #[schema(value_type = Object)]
    detail: serde_json::Value,
}

/// Adds the schema of a body.
type Tell = fn(&mut BTreeMap<String, RefOr<Schema>>);

/// The JSON bodies, whose fields are described by the code that reads them.
const BODIES: [Tell; 13] = [
    bounds::tell::<AccessRequest>,
    bounds::tell::<BatchRequest>,
    bounds::tell::<CompleteRequest>,
    bounds::tell::<FailRequest>,
    bounds::tell::<FlagsRequest>,
    bounds::tell::<LeaseRequest>,
    bounds::tell::<LinkRequest>,
    bounds::tell::<OnboardingRequest>,
    bounds::tell::<OrganizationRequest>,
    bounds::tell::<ProgressRequest>,
    bounds::tell::<Remember>,
    bounds::tell::<ReplayRequest>,
    bounds::tell::<VideoRequest>,
];

/// The whole document.
pub fn describe() -> OpenApi {
    let mut document = Base::openapi();
    document.servers =
        Some(PREFIXES.into_iter().map(|prefix| ServerBuilder::new().url(prefix).build()).collect());
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("JWT").build();
    if let Some(components) = &mut document.components {
        components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
        let schemas = &mut components.schemas;
        for tell in BODIES {
            tell(schemas);
        }
    }
    for route in table() {
        let method = match route.method {
            Method::GET => HttpMethod::Get,
            Method::HEAD => HttpMethod::Head,
            Method::PUT => HttpMethod::Put,
            Method::PATCH => HttpMethod::Patch,
            Method::DELETE => HttpMethod::Delete,
            Method::OPTIONS => HttpMethod::Options,
            _ => HttpMethod::Post,
        };
        let item = PathItem::new(method, operation(&route).build());
        match document.paths.paths.get_mut(route.path) {
            Some(known) => known.merge_operations(item),
            None => {
                document.paths.paths.insert(route.path.to_owned(), item);
            }
        }
    }
    document
}

fn operation(route: &Route) -> OperationBuilder {
    let method = route.method.as_str().to_lowercase();
    let mut operation = OperationBuilder::new()
        .operation_id(Some(format!(
            "{method}{}",
            route.path.replace(['/', '-', '.'], "_").replace(['{', '}'], "")
        )))
        .summary(Some(route.summary))
        .response(route.status.to_string(), success(route))
        .response("default", failure());
    for parameter in parameters(route) {
        operation = operation.parameter(parameter);
    }
    if let Some(needs) = needs(route.access) {
        operation = operation.description(Some(needs));
    }
    if let Some(body) = route.body {
        let (media_type, schema) = match body {
            Body::Json(schema) => ("application/json", named(schema)),
            Body::Form(schema) => ("multipart/form-data", named(schema)),
            Body::Bytes(media_type) => (media_type, Schema::from(bytes()).into()),
        };
        let content = ContentBuilder::new().schema(Some(schema)).build();
        let body = RequestBodyBuilder::new().content(media_type, content);
        operation = operation.request_body(Some(body.build()));
    }
    if route.access != Access::Public {
        operation =
            operation.security(SecurityRequirement::new::<_, [String; 0], String>("bearer", []));
    }
    operation
}

fn parameters(route: &Route) -> Vec<Parameter> {
    let in_path = |name: &&str| route.path.contains(&format!("{{{name}}}"));
    let mut all: Vec<Parameter> = ["id", "session_id"]
        .into_iter()
        .filter(in_path)
        .map(|name| {
            parameter(name, ParameterIn::Path, id_in(route.path)).required(Required::True).build()
        })
        .collect();
    all.extend(route.parameters.map(|parameters| parameters()).unwrap_or_default());
    if route.paged {
        all.extend(query::<PageParameters>());
    }
    if route.keyed {
        let words = "The same key and request again are given \
                     the same answer, and nothing happens twice.";
        let text = ObjectBuilder::new().schema_type(Type::String).pattern(Some("^[!-~]{1,255}$"));
        all.push(header_of("Idempotency-Key", words, text));
    }
    if !matches!(route.access, Access::Public | Access::Worker) {
        let words = "A position that an earlier answer told: waits, 2 s at most, until all up to \
                     it can be read here.";
        all.push(header_of("X-Log-Position", words, position()));
    }
    all
}

fn parameter(name: &str, place: ParameterIn, schema: ObjectBuilder) -> ParameterBuilder {
    ParameterBuilder::new().name(name).parameter_in(place).schema(Some(schema))
}

/// Users, sessions and deliveries have ids of Clerk's.
fn id_in(path: &str) -> ObjectBuilder {
    match ["/admin/", "/sessions/"].iter().any(|clerks| path.starts_with(clerks)) {
        true => text(),
        false => text().format(Some(SchemaFormat::KnownFormat(KnownFormat::Uuid))),
    }
}

fn text() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::String)
}

/// A position of the log.
pub fn position() -> ObjectBuilder {
    let format = SchemaFormat::KnownFormat(KnownFormat::Int64);
    ObjectBuilder::new().schema_type(Type::Integer).format(Some(format)).minimum(Some(0))
}

/// One of a few words; what it says of itself stands here, since nothing beside it is told.
pub fn one_of<'a>(description: &str, names: impl IntoIterator<Item = &'a str>) -> Object {
    text().description(Some(description)).enum_values(Some(names)).build()
}

/// What the query may hold: the very fields that are read of it.
pub fn query<T: IntoParams>() -> Vec<Parameter> {
    T::into_params(|| Some(ParameterIn::Query)).into_iter().map(definite).collect()
}

/// What may be absent is not null in a query: that would be a text.
fn definite(mut parameter: Parameter) -> Parameter {
    if let Some(RefOr::T(Schema::Object(schema))) = &mut parameter.schema
        && let SchemaType::Array(types) = &schema.schema_type
        && let Some(only) = types.iter().find(|it| **it != Type::Null)
    {
        schema.schema_type = SchemaType::Type(only.clone());
    }
    parameter
}

/// A header that may be sent.
pub fn header(name: &str, words: &str) -> Parameter {
    header_of(name, words, text())
}

/// A header without which a request is refused.
pub fn needed_header(name: &str, words: &str) -> Parameter {
    let mut header = header(name, words);
    header.required = Required::True;
    header
}

/// A header that may be sent, and holds this.
pub fn header_of(name: &str, words: &str, schema: ObjectBuilder) -> Parameter {
    let header = parameter(name, ParameterIn::Header, schema).required(Required::False);
    header.description(Some(words)).build()
}

fn bytes() -> ObjectBuilder {
    let format = SchemaFormat::KnownFormat(KnownFormat::Binary);
    ObjectBuilder::new().schema_type(Type::String).format(Some(format))
}

/// What a caller must be beyond authenticated.
fn needs(access: Access) -> Option<String> {
    Some(match access {
        Access::Public | Access::Authenticated => return None,
        Access::Premium => "Needs tier `premium` or `enterprise`.".to_owned(),
        Access::Admin => "Needs role `admin`.".to_owned(),
        Access::Worker => "Needs a worker's token (`T2M_WORKER_TOKENS`).".to_owned(),
        Access::Permission(name) => format!("Needs permission `{name}`, or role `admin`."),
    })
}

fn success(route: &Route) -> utoipa::openapi::Response {
    let response = ResponseBuilder::new().description(route.summary);
    if let Some(media_type) = route.media {
        let schema = match media_type {
            "application/json" => ObjectBuilder::new(),
            "*/*" => bytes(),
            _ => text(),
        };
        let content = ContentBuilder::new().schema(Some(schema)).build();
        return response.content(media_type, content).build();
    }
    let Some(data) = route.data else { return response.build() };
    let data = if route.paged { page_of(data) } else { named(data) };
    let envelope = ObjectBuilder::new()
        .property("success", ObjectBuilder::new().schema_type(Type::Boolean))
        .property("data", data)
        .required("success")
        .required("data")
        .build();
    let schema: RefOr<Schema> = Schema::from(envelope).into();
    response.content("application/json", ContentBuilder::new().schema(Some(schema)).build()).build()
}

/// See `lists::PageAnswer`.
fn page_of(schema: &str) -> RefOr<Schema> {
    let cursor = [Type::String, Type::Null];
    let page = ObjectBuilder::new()
        .property("items", ArrayBuilder::new().items(named(schema)))
        .property("next_cursor", ObjectBuilder::new().schema_type(SchemaType::from_iter(cursor)))
        .required("items")
        .required("next_cursor")
        .build();
    Schema::from(page).into()
}

fn failure() -> utoipa::openapi::Response {
    let content = ContentBuilder::new().schema(Some(named("Problem"))).build();
    ResponseBuilder::new()
        .description("A refusal or a failure; `code` says which")
        .content("application/json", content)
        .build()
}

fn named(schema: &str) -> RefOr<Schema> {
    RefOr::Ref(Ref::from_schema_name(schema))
}

/// `GET openapi.json`
pub async fn document() -> HttpResponse {
    static DOCUMENT: LazyLock<Bytes> = LazyLock::new(|| json!(describe()).to_string().into());
    HttpResponse::Ok().content_type("application/json").body(DOCUMENT.clone())
}

/// `/docs`: Swagger UI, whose files are part of the binary.
pub fn page(config: &mut ServiceConfig) {
    config.service(actix_web::web::redirect("/docs", "/docs/"));
    config.service(SwaggerUi::new("/docs/{_:.*}").url("/api/openapi.json", describe()));
}

#[cfg(test)]
mod tests;
