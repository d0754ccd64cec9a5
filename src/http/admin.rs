//! What administrators see and decide about users.

use std::collections::{BTreeMap, BTreeSet};

use actix_web::{HttpResponse, web};
use serde_json::{Map, Value};

use super::answer;
use super::app::App;
use super::caller::Caller;
use super::jobs::at_position;
use super::json::{Fields, FromFields, Json};
use super::lists::{PageAnswer, PageQuery};
use super::problem::{Code, Problem};
use crate::domain::ids::UserId;
use crate::domain::user::{AccessChange, Assignment, Command, Membership, Placement};
use crate::views::{UserRow, View};

/// `GET admin/users`
pub async fn users(app: web::Data<App>, page: PageQuery) -> Result<HttpResponse, Problem> {
    let found = app.system.views.users(page.cursor.as_ref(), page.limit)?;
    Ok(answer::ok(PageAnswer { items: found.items, next_cursor: found.next_cursor }))
}

/// `GET admin/users/{id}`
pub async fn user(app: web::Data<App>, id: web::Path<String>) -> Result<HttpResponse, Problem> {
    Ok(answer::ok(known(&app, &parse_id(&id)?)?))
}

/// The body of `PUT admin/users/{id}/access`; a field that is absent stays as it is.
#[derive(Debug, utoipa::ToSchema)]
pub struct AccessRequest {
    pub role: Option<String>,
    pub permissions: Option<Vec<String>>,
    pub subscription_tier: Option<String>,
}

impl FromFields for AccessRequest {
    fn from_fields(fields: &mut Fields) -> Self {
        fields.alias("subscriptionTier", "subscription_tier");
        Self {
            role: fields.optional_text("role", 1..=64),
            permissions: fields.optional_texts("permissions", 0..=256, 1..=128),
            subscription_tier: fields.optional_text("subscription_tier", 1..=64),
        }
    }
}

/// `PUT admin/users/{id}/access`
pub async fn set_access(
    app: web::Data<App>,
    caller: Caller,
    id: web::Path<String>,
    body: Json<AccessRequest>,
) -> Result<HttpResponse, Problem> {
    let user_id = parse_id(&id)?;
    known(&app, &user_id)?;
    let AccessRequest { role, permissions, subscription_tier } = body.0;
    let permissions = permissions.map(BTreeSet::from_iter);
    let access = AccessChange { role, permissions, subscription_tier };
    change(&app, &caller, &user_id, Command::SetAccess(access)).await
}

/// The body of `PUT admin/users/{id}/feature-flags`.
#[derive(Debug, utoipa::ToSchema)]
pub struct FlagsRequest {
    /// Name to true or false; they replace the present ones.
    #[schema(value_type = BTreeMap<String, bool>)]
    pub feature_flags: Map<String, Value>,
}

impl FromFields for FlagsRequest {
    fn from_fields(fields: &mut Fields) -> Self {
        fields.alias("featureFlags", "feature_flags");
        let flags = fields.optional_map("feature_flags");
        if flags.as_ref().is_none_or(|flags| !flags.values().all(Value::is_boolean)) {
            fields.refuse("feature_flags", "must be an object of true and false");
        }
        Self { feature_flags: flags.unwrap_or_default() }
    }
}

/// `PUT admin/users/{id}/feature-flags`
pub async fn set_flags(
    app: web::Data<App>,
    caller: Caller,
    id: web::Path<String>,
    body: Json<FlagsRequest>,
) -> Result<HttpResponse, Problem> {
    let user_id = parse_id(&id)?;
    known(&app, &user_id)?;
    let flags = body.0.feature_flags.into_iter();
    let flags: BTreeMap<String, bool> =
        flags.map(|(name, value)| (name, value == Value::Bool(true))).collect();
    change(&app, &caller, &user_id, Command::SetFlags(flags)).await
}

/// The body of `PUT admin/users/{id}/organization` (seed `marketplace-session-token`, step 3, whose
/// spelling `organizationId` is accepted too). A field that is absent stays as it is.
#[derive(Debug, utoipa::ToSchema)]
pub struct OrganizationRequest {
    /// `freelancer`, `vendor_company`, `customer_organization`, or what else the app knows.
    pub user_type: Option<String>,
    /// Null takes the user out of the organization that an administrator put it in; memberships
    /// that Clerk told of are Clerk's to end.
    pub organization_id: Option<String>,
    pub organization_name: Option<String>,
    /// Required with an organization.
    pub organization_role: Option<String>,
    /// Those within the organization.
    pub permissions: Option<Vec<String>>,
    #[schema(ignore)]
    leaves: bool,
}

impl FromFields for OrganizationRequest {
    fn from_fields(fields: &mut Fields) -> Self {
        fields.alias("userType", "user_type");
        fields.alias("organizationId", "organization_id");
        fields.alias("organizationName", "organization_name");
        fields.alias("organizationRole", "organization_role");
        let leaves = fields.is_null("organization_id");
        let request = Self {
            user_type: fields.optional_text("user_type", 1..=64),
            organization_id: fields.optional_text("organization_id", 1..=128),
            organization_name: fields.optional_text("organization_name", 1..=256),
            organization_role: fields.optional_text("organization_role", 1..=64),
            permissions: fields.optional_texts("permissions", 0..=256, 1..=128),
            leaves,
        };
        let lone = request.organization_name.is_some()
            || request.organization_role.is_some()
            || request.permissions.is_some();
        match &request.organization_id {
            Some(_) if request.organization_role.is_none() => {
                fields.refuse("organization_role", "is required with an organization");
            }
            None if lone => fields.refuse("organization_id", "is required with the other fields"),
            Some(_) | None => {}
        }
        request
    }
}

/// `PUT admin/users/{id}/organization`
pub async fn set_organization(
    app: web::Data<App>,
    caller: Caller,
    id: web::Path<String>,
    body: Json<OrganizationRequest>,
) -> Result<HttpResponse, Problem> {
    let user_id = parse_id(&id)?;
    known(&app, &user_id)?;
    let body = body.0;
    let organization = match body.organization_id {
        Some(organization_id) => Assignment::Member(Membership {
            membership_id: Membership::administered(app.system.clock.fresh_id()),
            organization_id,
            name: body.organization_name,
            slug: None,
            role: body.organization_role.unwrap_or_default(),
            permissions: body.permissions.unwrap_or_default().into_iter().collect(),
        }),
        None if body.leaves => Assignment::Nowhere,
        None => Assignment::AsItIs,
    };
    let placement = Placement { user_type: body.user_type, organization };
    change(&app, &caller, &user_id, Command::Place(placement)).await
}

async fn change(
    app: &App,
    caller: &Caller,
    user_id: &UserId,
    command: Command,
) -> Result<HttpResponse, Problem> {
    let done = app.system.users.execute(user_id, command, caller.origin()).await?;
    app.system.visible_in(View::Users, done.position).await?;
    Ok(at_position(answer::ok(known(app, user_id)?), done.position))
}

/// What is known of a user.
///
/// # Errors
/// 404.
pub fn known(app: &App, user_id: &UserId) -> Result<UserRow, Problem> {
    app.system.views.user(user_id)?.ok_or_else(|| Problem::new(Code::NotFound))
}

/// What cannot be a user's id is no user.
pub fn parse_id(text: &str) -> Result<UserId, Problem> {
    UserId::try_from(text.to_owned()).map_err(|_| Problem::new(Code::NotFound))
}
