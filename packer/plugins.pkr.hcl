# Only for a current Packer (1.7 or later), whose builders are plugins: run `packer init packer/plugins.pkr.hcl` once,
# then build agent.pkr.hcl as usual. It stands in a file of its own because Packer 1.6.6, which Kiln is tested with,
# refuses the required_plugins block; so this file cannot be tried with 1.6.6, and is untested.

packer {
  required_plugins {
    amazon = {
      source  = "github.com/hashicorp/amazon"
      version = ">= 1.3.0, < 2.0.0"
    }
    docker = {
      source  = "github.com/hashicorp/docker"
      version = ">= 1.1.0, < 2.0.0"
    }
  }
}
