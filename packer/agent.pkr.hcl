# An image with one coding agent in it: an AMI (amazon-ebs.agent) or a container image (docker.agent), by the same scripts.
#
#   packer build -only=amazon-ebs.agent -var-file=build.pkrvars.json packer/agent.pkr.hcl
#   packer build -only=docker.agent     -var-file=build.pkrvars.json packer/agent.pkr.hcl
#
# docker.published pulls its base image, and pushes what it makes: so Kiln builds container images. It is a source of its
# own because Packer 1.6.6 takes no expressions in a post-processor's `only`.
#
# Works with Packer 1.6.6, which has all builders built in and no `regex` function: hence regex_replace(…) == "" in the
# validations. A current Packer gets its plugins with `packer init packer/plugins.pkr.hcl` first.

# ---- What a user may choose -------------------------------------------------------------------------------------------

variable "provider" {
  type        = string
  description = "Agent to install: claude-code, codex, gemini or cursor."
  validation {
    condition     = contains(["claude-code", "codex", "gemini", "cursor"], var.provider)
    error_message = "The provider must be claude-code, codex, gemini or cursor."
  }
}

variable "agent_version" {
  type        = string
  description = "Version of the agent: latest, another tag of its registry, or a pinned version such as 1.2.3."
  default     = "latest"
  validation {
    condition     = var.agent_version != "" && regex_replace(var.agent_version, "^[0-9A-Za-z][0-9A-Za-z._+-]*$", "") == ""
    error_message = "The agent_version must be latest, a tag or a version: letters, digits and . _ + - only."
  }
}

variable "region" {
  type        = string
  description = "AWS region of the AMI."
  default     = "us-east-1"
}

variable "instance_type" {
  type        = string
  description = "EC2 type of the build's instance. A Graviton type gives an arm64 image."
  default     = "t3.medium"
}

variable "volume_size_gb" {
  type        = string
  description = "Size of the AMI's root volume in GB."
  default     = "16"
  validation {
    condition     = var.volume_size_gb != "" && regex_replace(var.volume_size_gb, "^[1-9][0-9]{0,4}$", "") == ""
    error_message = "The volume_size_gb must be a whole number of GB from 1 to 99999."
  }
}

variable "encrypt_volume" {
  type        = string
  description = "Encrypt the root volume, and with it the AMI's snapshot, under the account's default key: true or false."
  default     = "false"
  validation {
    condition     = contains(["true", "false"], var.encrypt_volume)
    error_message = "The encrypt_volume must be true or false."
  }
}

variable "ami_name_prefix" {
  type        = string
  description = "What the AMI's name begins with, where Kiln does not give the whole name."
  default     = "agent"
  validation {
    condition     = var.ami_name_prefix != "" && regex_replace(var.ami_name_prefix, "^[A-Za-z0-9()./_' -]{1,60}$", "") == ""
    error_message = "The ami_name_prefix must be 1 to 60 of the characters that an AMI name may have."
  }
}

variable "extra_packages" {
  type        = string
  description = "Debian or Ubuntu packages to install as well, separated by spaces or commas."
  default     = ""
  validation {
    condition     = regex_replace(var.extra_packages, "^([ ,]*[a-z0-9][a-z0-9+.-]*[a-z0-9+])*[ ,]*$", "") == ""
    error_message = "The extra_packages must be Debian package names, separated by spaces or commas."
  }
}

variable "agent_user" {
  type        = string
  description = "User without privileges that the agent runs as; made if it is missing."
  default     = "agent"
  validation {
    condition = (
      var.agent_user != "" && var.agent_user != "root" && regex_replace(var.agent_user, "^[a-z_][a-z0-9_-]{0,31}$", "") == ""
    )
    error_message = "The agent_user must be a user name of at most 32 lower-case letters, digits, _ and -, and not root."
  }
}

variable "npm_registry" {
  type        = string
  description = "URL of the npm registry to install from; empty for npm's own default."
  default     = ""
  validation {
    condition     = regex_replace(var.npm_registry, "^https?://[A-Za-z0-9._~:/-]+$", "") == ""
    error_message = "The npm_registry must be an http or https URL."
  }
}

variable "npm_token" {
  type        = string
  description = "Token for the npm registry, where it asks for one. It is neither printed nor left in the image."
  default     = ""
  sensitive   = true
}

variable "source_ami_owner" {
  type        = string
  description = "AWS account (or alias) that publishes the source AMI. The default is Canonical."
  default     = "099720109477"
}

variable "source_ami_name" {
  type        = string
  description = "Name of the source AMI, with * for any; the newest is taken. Empty for Ubuntu 24.04 of the instance's architecture."
  default     = ""
}

variable "root_device_name" {
  type        = string
  description = "Root device of the source AMI: /dev/sda1 for Ubuntu, /dev/xvda for Debian."
  default     = "/dev/sda1"
}

variable "ssh_username" {
  type        = string
  description = "User that the source AMI lets in by SSH, with sudo: ubuntu for Ubuntu, admin for Debian."
  default     = "ubuntu"
}

variable "communicator" {
  type        = string
  description = "How to reach the instance: ssh, ssm (SSH through Session Manager), or none: nothing is installed (simulated EC2)."
  default     = "ssh"
  validation {
    condition     = contains(["ssh", "ssm", "none"], var.communicator)
    error_message = "The communicator must be ssh, ssm or none."
  }
}

# ---- What Kiln sets itself --------------------------------------------------------------------------------------------

variable "kiln_image_name" {
  type        = string
  description = "Full name of the AMI; Kiln's ends in the build's id and attempt. Empty for prefix, provider and time."
  default     = ""
}

variable "kiln_key_pair_name" {
  type        = string
  description = "Name of the temporary EC2 key pair. Empty for one of Packer's."
  default     = ""
}

variable "kiln_security_group_id" {
  type        = string
  description = "Security group of the build's instance. Empty lets Packer make a temporary one."
  default     = ""
}

variable "kiln_tags" {
  type        = map(string)
  description = "Tags of the AMI, its snapshots, and the build's instance and volumes."
  default     = {}
}

variable "kiln_ec2_endpoint" {
  type        = string
  description = "URL of the EC2 API. Empty for AWS."
  default     = ""
}

variable "kiln_subnet_id" {
  type        = string
  description = "Subnet of the build's instance. Empty for the default VPC's."
  default     = ""
}

variable "kiln_iam_instance_profile" {
  type        = string
  description = "Instance profile of the build's instance; the ssm communicator needs one that allows Session Manager."
  default     = ""
}

variable "kiln_base_image" {
  type        = string
  description = "Image that the container image begins with, Debian or Ubuntu. docker.agent needs it in the engine."
  default     = "kiln/minbase:bookworm"
}

variable "kiln_container_reference" {
  type        = string
  description = "Name, with an optional :tag, for the container image. Empty for kiln/agent-PROVIDER:latest."
  default     = ""
}

variable "kiln_container_network" {
  type        = string
  description = "Docker network of the build's container: bridge, or host where the engine has no bridge."
  default     = "bridge"
}

variable "kiln_container_name" {
  type        = string
  description = "Name of docker.published's container; its image has it as the label kiln-build."
  default     = "kiln-agent-build"
}

# The bundle is used while the image is built, and does not stay in it: an image that trusts a build site's proxy would
# go on trusting it wherever it runs. Machines behind that proxy get the bundle when they are started.
variable "kiln_ca_bundle" {
  type        = string
  description = "PEM file on this host with further certificate authorities, for builds behind a proxy. Empty for none."
  default     = ""
}

# ---- What follows from that -------------------------------------------------------------------------------------------

locals {
  provisioned = var.communicator != "none"

  image_name = (
    var.kiln_image_name != "" ? var.kiln_image_name
    : "${var.ami_name_prefix}-${var.provider}-${formatdate("YYYYMMDDhhmmss", timestamp())}"
  )
  tags = merge({ "Name" = local.image_name, "agent-provider" = var.provider }, var.kiln_tags)

  # Graviton types have a g after their generation's number: t4g, c7gn, im4gn.
  architecture = regex_replace(var.instance_type, "^([a-z]+[0-9]+g[a-z]*|a1)[.].+$", "") == "" ? "arm64" : "amd64"

  # An instance that nobody logs in to may be of any release; simulated EC2 knows old ones only.
  ubuntu_ami_name = (
    local.provisioned ? "ubuntu/images/hvm-ssd*/ubuntu-noble-24.04-${local.architecture}-server-*"
    : "ubuntu/images/hvm-ssd*/ubuntu-*-server-*"
  )

  container_reference  = var.kiln_container_reference != "" ? var.kiln_container_reference : "kiln/agent-${var.provider}"
  container_repository = regex_replace(local.container_reference, ":[^:/]*$", "")
  container_tag = (
    local.container_repository == local.container_reference ? "latest" : regex_replace(local.container_reference, "^.*:", "")
  )

  # Not Packer's default, which gives an entry point that the image keeps: `docker commit` cannot clear one.
  container_options = ["-d", "-i", "-t", "--network=${var.kiln_container_network}"]
  container_command = ["--", "{{.Image}}", "/bin/sh"]
  image_changes = [
    "CMD [\"/bin/bash\"]",
    "USER ${var.agent_user}",
    "WORKDIR /home/${var.agent_user}",
    "LABEL agent-provider=${var.provider}",
  ]

  # For `except`, which may be an expression: without a communicator, Packer 1.6.6 tries a provisioner for five minutes
  # and fails the build.
  every_source      = ["amazon-ebs.agent", "docker.agent", "docker.published"]
  unreached_sources = local.provisioned ? [] : ["amazon-ebs.agent"]

  upload_folder = "/tmp/kiln-build"
}

source "amazon-ebs" "agent" {
  region              = var.region
  custom_endpoint_ec2 = var.kiln_ec2_endpoint
  instance_type       = var.instance_type
  subnet_id           = var.kiln_subnet_id
  security_group_id   = var.kiln_security_group_id

  source_ami_filter {
    filters = {
      name                = var.source_ami_name != "" ? var.source_ami_name : local.ubuntu_ami_name
      root-device-type    = "ebs"
      virtualization-type = "hvm"
    }
    owners      = [var.source_ami_owner]
    most_recent = true
  }

  # Packer 1.6.6 has no defaults for gp3: these two are what EC2 gives for nothing.
  launch_block_device_mappings {
    device_name           = var.root_device_name
    volume_size           = var.volume_size_gb
    volume_type           = "gp3"
    iops                  = 3000
    throughput            = 125
    encrypted             = var.encrypt_volume
    delete_on_termination = true
  }

  communicator              = var.communicator == "ssm" ? "ssh" : var.communicator
  ssh_interface             = var.communicator == "ssm" ? "session_manager" : ""
  ssh_username              = var.ssh_username
  ssh_clear_authorized_keys = true
  iam_instance_profile      = var.kiln_iam_instance_profile
  temporary_key_pair_name   = var.kiln_key_pair_name

  ami_name        = local.image_name
  tags            = local.tags
  run_tags        = local.tags
  run_volume_tags = local.tags
  snapshot_tags   = local.tags
}

source "docker" "agent" {
  image       = var.kiln_base_image
  pull        = false
  commit      = true
  run_command = concat(local.container_options, local.container_command)
  changes     = local.image_changes
}

# Its container is found by its name, and its image by its label, if Packer is killed. The base image may have a user that
# is not root.
source "docker" "published" {
  image  = var.kiln_base_image
  pull   = true
  commit = true
  run_command = concat(
    local.container_options, ["--user=0", "--name=${var.kiln_container_name}"], local.container_command
  )
  changes = concat(local.image_changes, ["LABEL kiln-build=${var.kiln_container_name}"])
}

build {
  sources = ["source.amazon-ebs.agent", "source.docker.agent", "source.docker.published"]

  provisioner "shell" {
    except = local.unreached_sources
    inline = ["mkdir -p ${local.upload_folder}"]
  }

  provisioner "file" {
    except      = local.unreached_sources
    source      = "${path.root}/scripts/"
    destination = local.upload_folder
  }

  provisioner "file" {
    except      = var.kiln_ca_bundle == "" ? local.every_source : local.unreached_sources
    source      = var.kiln_ca_bundle
    destination = "${local.upload_folder}/ca-bundle.pem"
  }

  # Variables go in a file that Packer deletes, because a token on a command line shows in the process list.
  provisioner "shell" {
    except           = local.unreached_sources
    use_env_var_file = true
    environment_vars = [
      "KILN_PROVIDER=${var.provider}",
      "KILN_AGENT_VERSION=${var.agent_version}",
      "KILN_AGENT_USER=${var.agent_user}",
      "KILN_EXTRA_PACKAGES=${var.extra_packages}",
      "KILN_NPM_REGISTRY=${var.npm_registry}",
      "KILN_NPM_TOKEN=${var.npm_token}",
    ]
    execute_command = ". {{.EnvVarFile}} && if [ $(id -u) = 0 ]; then bash {{.Path}}; else sudo -E bash {{.Path}}; fi"
    inline          = ["bash ${local.upload_folder}/build.sh"]
  }

  post-processors {
    post-processor "docker-tag" {
      only       = ["docker.agent", "docker.published"]
      repository = local.container_repository
      tags       = [local.container_tag]
    }

    post-processor "docker-push" {
      only = ["docker.published"]
    }
  }
}
